//! PEFT's format: adapters that PEFT saved (`fixtures/checkpoints.py`), and all kinds of layers to
//! PEFT's factors and back.

mod common;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};
use common::{difference, rnd};
use lora::peft::{self, Kind, PeftConfig};
use lora::{Bias, LoraConfig, StateDict};
use loralib as lora;
use std::collections::HashMap;
use std::path::PathBuf;

const CPU: Device = Device::Cpu;
const CASES: [&str; 10] = [
    "linear",
    "bin",
    "rslora",
    "pattern",
    "embedding",
    "conv",
    "modules",
    "bias",
    "bias_lora_only",
    "gpt2",
];

fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft").join(case)
}

/// The base, what PEFT merges to, and the inputs and outputs.
fn model(case: &str) -> lora::Result<[StateDict; 4]> {
    let all = lora::read_state_dict(folder(case).join("model.safetensors"), &CPU)?.tensors;
    Ok(["base.", "merged.", "x.", "y."].map(|prefix| {
        let own =
            |(name, t): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.into(), t.clone()));
        all.iter().filter_map(own).collect()
    }))
}

#[test]
fn what_peft_saved_merges_to_what_peft_merges_to() -> lora::Result<()> {
    for case in CASES {
        let [base, merged, ..] = model(case)?;
        let (config, adapter) = peft::load_pretrained(folder(case), &CPU)?;
        let ours = lora::merge_into(&base, &adapter, &config)?;
        assert!(ours.keys().eq(merged.keys()), "{case}");
        let (mut apart, mut changed) = (0f64, 0);
        for (name, tensor) in &ours {
            apart = apart.max(difference(tensor, &merged[name])?);
            changed += usize::from(difference(tensor, &base[name])? > 1e-3);
        }
        println!("{case}: {changed} tensors changed, apart {apart:.1e}");
        assert!(apart < 1e-6, "{case}: {apart}");
        assert!(changed >= 2, "{case}: {changed}");
    }
    Ok(())
}

#[test]
fn a_layer_with_a_loaded_adapter_computes_what_peft_computes() -> lora::Result<()> {
    for case in CASES {
        let [base, _, x, y] = model(case)?;
        let (config, adapter) = peft::load_pretrained(folder(case), &CPU)?;
        let mut tensors: HashMap<_, _> = base.into_iter().collect();
        tensors.extend(adapter);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
        let mut apart = 0f64;
        for (path, x) in &x {
            let cfg = LoraConfig { lora_dropout: 0., ..config.lora_config(path) };
            let (vb, y) = (vb.pp(path), &y[path]);
            let w = vb.get_unchecked("weight")?;
            let d = w.dims();
            let bias = vb.contains_tensor("bias");
            let ours = match (config.layers.get(path).map(|layer| &layer.kind), w.rank()) {
                (Some(Kind::Embedding), _) => lora::embedding(d[0], d[1], cfg, vb)?.forward(x)?,
                (_, 2) if cfg.fan_in_fan_out => lora::linear(d[0], d[1], cfg, vb)?.forward(x)?,
                (_, 2) => lora::linear_b(d[1], d[0], bias, cfg, vb)?.forward(x)?,
                (_, 3) => {
                    let options = Conv1dConfig::default();
                    lora::conv1d(d[1], d[0], d[2], options, cfg, vb)?.forward(x)?
                }
                (_, 4) => {
                    let options = Conv2dConfig::default();
                    lora::conv2d_no_bias(d[1], d[0], d[2], options, cfg, vb)?.forward(x)?
                }
                _ => {
                    let options = lora::Conv3dConfig::default();
                    lora::conv3d(d[1], d[0], d[2], options, cfg, vb)?.forward(x)?
                }
            };
            apart = apart.max(difference(&ours, y)?);
        }
        println!("{case}: outputs apart {apart:.1e}");
        assert!(apart < 2e-6, "{case}: {apart}");
    }
    Ok(())
}

#[test]
fn options_and_ranks_of_a_layer_are_read() -> lora::Result<()> {
    let (config, _) = peft::load_pretrained(folder("pattern"), &CPU)?;
    let own = |path: &str| (config.lora_config(path).r, config.lora_config(path).lora_alpha);
    assert_eq!(own("layers.0.q"), (5, 7.));
    assert_eq!(own("layers.1.q"), (3, 7.));
    assert_eq!(own("layers.0.o"), (3, 4.5));
    assert_eq!(own("layers.1.o"), (2, 4.5));
    let (config, _) = peft::load_pretrained(folder("rslora"), &CPU)?;
    assert!(config.lora.rslora);
    assert_eq!(config.lora_config("layers.0.q").scaling(), 7. / 3f64.sqrt());
    let (config, tensors) = peft::load_pretrained(folder("modules"), &CPU)?;
    assert_eq!(config.modules_to_save, ["head"]);
    assert_eq!(tensors["head.weight"].dims(), [3, 6]);
    let (config, tensors) = peft::load_pretrained(folder("bias"), &CPU)?;
    assert_eq!(config.bias, Bias::All);
    assert!(tensors.contains_key("layers.0.q.bias") && tensors.contains_key("conv1.bias"));
    let (config, _) = peft::load_pretrained(folder("gpt2"), &CPU)?;
    assert_eq!(config.task_type.as_deref(), Some("CAUSAL_LM"));
    assert!(config.lora_config("transformer.h.0.attn.c_attn").fan_in_fan_out);
    assert!(!config.lora_config("transformer.wte").fan_in_fan_out);
    Ok(())
}

/// What PEFT saved, saved again: PEFT's keys and values, and a configuration that says the same.
#[test]
fn what_peft_saved_is_saved_as_it_was() -> lora::Result<()> {
    for case in CASES {
        let (config, adapter) = peft::load_pretrained(folder(case), &CPU)?;
        let dir = tempfile::tempdir()?;
        peft::save_pretrained(dir.path(), &adapter, &config)?;
        let again = peft::load_pretrained(dir.path(), &CPU)?;
        let [base, merged, ..] = model(case)?;
        for (name, tensor) in lora::merge_into(&base, &again.1, &again.0)? {
            assert!(difference(&tensor, &merged[&name])? < 1e-6, "{case} {name}");
        }
        if case != "conv" && case != "bin" {
            let file = "adapter_model.safetensors";
            let ours = lora::read_state_dict(dir.path().join(file), &CPU)?.tensors;
            let theirs = lora::read_state_dict(folder(case).join(file), &CPU)?.tensors;
            assert!(ours.keys().eq(theirs.keys()), "{case}");
            for (name, tensor) in &ours {
                assert_eq!(common::bits(tensor)?, common::bits(&theirs[name])?, "{case} {name}");
            }
            assert_eq!(again.0, config, "{case}");
        }
    }
    Ok(())
}

struct Sample {
    base: StateDict,
    adapter: StateDict,
    config: PeftConfig,
}

/// A path, and the shapes of W, A and B.
type Shapes<'a> = (&'a str, &'a [usize], [usize; 2], [usize; 2]);

/// A layer of each kind, with factors of rank 2.
fn sample(rslora: bool) -> lora::Result<Sample> {
    let lora = LoraConfig { r: 2, lora_alpha: 3., rslora, ..Default::default() };
    let shapes: [Shapes; 8] = [
        ("h.q", &[6, 4], [2, 4], [6, 2]),
        ("h.qkv", &[9, 4], [4, 4], [6, 2]),
        ("h.gqa", &[8, 4], [4, 4], [6, 2]),
        ("wte", &[7, 4], [2, 7], [4, 2]),
        ("c1", &[5, 4, 3], [6, 8], [5, 6]),
        ("c2", &[5, 4, 3, 3], [6, 12], [15, 6]),
        ("c3", &[5, 4, 3, 3, 3], [6, 36], [15, 6]),
        ("one", &[5, 4, 1, 1], [2, 4], [5, 2]),
    ];
    let config = PeftConfig::from(lora)
        .with("qkv", Kind::MergedLinear(vec![true, false, true]))
        .with("gqa", Kind::Splits(vec![(4, true), (2, false), (2, true)]))
        .with("wte", Kind::Embedding)
        .with("c1", Kind::Conv1d { groups: 1 })
        .with("c2", Kind::Conv2d { groups: 1 })
        .with("c3", Kind::Conv3d { groups: 1 })
        .with("one", Kind::Conv2d { groups: 1 });
    let (mut base, mut adapter) = (StateDict::new(), StateDict::new());
    for (i, (path, weight, a, b)) in shapes.into_iter().enumerate() {
        let a = if path == "c1" { [6, 4 * 3] } else { a };
        let seed = 10 * i as u64;
        base.insert(format!("{path}.weight"), rnd(seed + 1, weight, DType::F32)?.to_device(&CPU)?);
        adapter.insert(format!("{path}.lora_A"), rnd(seed + 2, &a, DType::F32)?.to_device(&CPU)?);
        adapter.insert(format!("{path}.lora_B"), rnd(seed + 3, &b, DType::F32)?.to_device(&CPU)?);
    }
    Ok(Sample { base, adapter, config })
}

/// ΔW from PEFT's file by PEFT's formula, which knows nothing of loralib's factors.
fn delta(file: &StateDict, path: &str, scaling: f64) -> lora::Result<Tensor> {
    let key = |end: &str| file.get(&format!("base_model.model.{path}.{end}")).cloned();
    if let (Some(a), Some(b)) = (key("lora_embedding_A"), key("lora_embedding_B")) {
        return Ok((b.matmul(&a)?.t()? * scaling)?);
    }
    let (a, b) = (key("lora_A.weight").unwrap(), key("lora_B.weight").unwrap());
    let shape = [&[b.dim(0)?][..], &a.dims()[1..]].concat();
    let (b, a) = (b.flatten_from(1)?, a.flatten_from(1)?);
    Ok((b.matmul(&a)? * scaling)?.reshape(shape)?)
}

#[test]
fn every_kind_of_layer_keeps_its_update_in_pefts_factors() -> lora::Result<()> {
    for rslora in [false, true] {
        let Sample { base, adapter, config } = sample(rslora)?;
        let dir = tempfile::tempdir()?;
        peft::save_pretrained(dir.path(), &adapter, &config)?;
        let merged = lora::merge_into(&base, &adapter, &config)?;
        let file = dir.path().join("adapter_model.safetensors");
        let file = lora::read_state_dict(file, &CPU)?.tensors;
        let json = std::fs::read(dir.path().join("adapter_config.json"))?;
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        for (name, w) in &base {
            let path = name.strip_suffix(".weight").unwrap();
            let own = |pattern: &str, common: &str| {
                json[pattern].get(path).unwrap_or(&json[common]).as_f64().unwrap()
            };
            let (r, alpha) = (own("rank_pattern", "r"), own("alpha_pattern", "lora_alpha"));
            let scaling = alpha / if rslora { r.sqrt() } else { r };
            let apart = difference(&(w + delta(&file, path, scaling)?)?, &merged[name])?;
            assert!(apart < 1e-6, "{path}: {apart}");
        }
        // Without a word on merged layers they come as linear ones; the update is the same.
        let (loaded, tensors) = peft::load_pretrained(dir.path(), &CPU)?;
        for (name, tensor) in lora::merge_into(&base, &tensors, &loaded)? {
            assert!(difference(&tensor, &merged[&name])? < 1e-6, "{name}");
        }
        assert_eq!(loaded.lora_config("h.qkv").r, 4);
    }
    Ok(())
}

#[test]
fn what_was_saved_comes_back_bit_for_bit() -> lora::Result<()> {
    for rslora in [false, true] {
        let Sample { adapter, config, .. } = sample(rslora)?;
        let dir = tempfile::tempdir()?;
        peft::save_pretrained(dir.path(), &adapter, &config)?;
        let kinds = [
            ("qkv", Kind::MergedLinear(vec![true, false, true])),
            ("gqa", Kind::Splits(vec![(4, true), (2, false), (2, true)])),
        ];
        let (loaded, tensors) = peft::load_pretrained_as(dir.path(), &kinds, &CPU)?;
        assert!(tensors.keys().eq(adapter.keys()));
        for (name, tensor) in &tensors {
            assert_eq!(tensor.dims(), adapter[name].dims(), "{name}");
            assert_eq!(common::bits(tensor)?, common::bits(&adapter[name])?, "{name}");
            let path = name.rsplit_once('.').unwrap().0;
            let (own, given) = (loaded.lora_config(path), config.lora_config(path));
            assert_eq!(own.r, given.r, "{path}");
            assert!((own.scaling() / given.scaling() - 1.).abs() < 1e-15, "{path}");
        }
    }
    Ok(())
}

#[test]
fn one_rank_for_all_layers_needs_no_pattern() -> lora::Result<()> {
    let Sample { mut adapter, config, .. } = sample(false)?;
    adapter.retain(|name, _| name.starts_with("h.qkv"));
    let config = PeftConfig {
        layers: config.layers.into_iter().filter(|(module, _)| module == "qkv").collect(),
        ..config
    };
    let dir = tempfile::tempdir()?;
    peft::save_pretrained(dir.path(), &adapter, &config)?;
    let json = std::fs::read(dir.path().join("adapter_config.json"))?;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!((&json["r"], &json["lora_alpha"]), (&4.into(), &6.into()));
    assert_eq!(json["rank_pattern"], serde_json::json!({}));
    assert_eq!(json["target_modules"], serde_json::json!(["h.qkv"]));
    Ok(())
}

#[test]
fn layers_of_several_ranks_are_saved_with_one_where_a_server_needs_it() -> lora::Result<()> {
    for rslora in [false, true] {
        let Sample { base, adapter, config } = sample(rslora)?;
        let config = PeftConfig { one_rank: true, ..config };
        let dir = tempfile::tempdir()?;
        peft::save_pretrained(dir.path(), &adapter, &config)?;
        let json = std::fs::read(dir.path().join("adapter_config.json"))?;
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["r"], 18);
        assert_eq!(json["rank_pattern"], serde_json::json!({}));
        assert_eq!(json["alpha_pattern"], serde_json::json!({}));
        let (loaded, tensors) = peft::load_pretrained(dir.path(), &CPU)?;
        let merged = lora::merge_into(&base, &adapter, &config)?;
        for (name, tensor) in lora::merge_into(&base, &tensors, &loaded)? {
            assert!(difference(&tensor, &merged[&name])? < 1e-6, "{name}");
        }
        let mut other = config;
        other.layers.entry("wte".into()).or_default().lora_alpha = Some(9.);
        let error = peft::save_pretrained(dir.path(), &adapter, &other).unwrap_err().to_string();
        assert!(error.contains("wte"), "{error}");
    }
    Ok(())
}

#[test]
fn a_dense_update_fits_a_merged_layer_with_every_part_enabled() -> lora::Result<()> {
    let [base, merged, ..] = model("gpt2")?;
    let kind = Kind::MergedLinear(vec![true; 3]);
    let (config, adapter) =
        peft::load_pretrained_as(folder("gpt2"), &[("c_attn", kind.clone())], &CPU)?;
    assert_eq!(adapter["transformer.h.0.attn.c_attn.lora_A"].dims(), [6, 8]);
    for (name, tensor) in lora::merge_into(&base, &adapter, &config)? {
        assert!(difference(&tensor, &merged[&name])? < 1e-6, "{name}");
    }
    let kind = Kind::MergedLinear(vec![true, false, true]);
    let error = peft::load_pretrained_as(folder("gpt2"), &[("c_attn", kind)], &CPU).unwrap_err();
    assert!(error.to_string().contains("c_attn.lora_A"), "{error}");
    Ok(())
}

fn refused(change: impl Fn(&mut serde_json::Value), tensors: impl Fn(&mut StateDict)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let source = folder("linear");
    let json = std::fs::read(source.join("adapter_config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    change(&mut json);
    std::fs::write(dir.path().join("adapter_config.json"), json.to_string()).unwrap();
    let file = source.join("adapter_model.safetensors");
    let mut all = lora::read_state_dict(file, &CPU).unwrap().tensors;
    tensors(&mut all);
    let path = dir.path().join("adapter_model.safetensors");
    candle_core::safetensors::save(&all.into_iter().collect::<HashMap<_, _>>(), path).unwrap();
    match peft::load_pretrained(dir.path(), &CPU) {
        Ok(_) => "loaded".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_changes_the_mathematics_is_refused_by_name() {
    let options = [
        ("use_dora", serde_json::json!(true)),
        ("init_lora_weights", "pissa".into()),
        ("init_lora_weights", "olora".into()),
        ("use_qalora", true.into()),
        ("layer_replication", serde_json::json!([[0, 2]])),
        ("trainable_token_indices", serde_json::json!([1])),
        ("lora_bias", true.into()),
        ("not_known_yet", 1.into()),
        ("peft_type", "LOHA".into()),
        ("rank_pattern", serde_json::json!({"q|o": 3})),
        ("r", 0.into()),
        ("lora_dropout", 1.into()),
    ];
    for (key, value) in options {
        let error = refused(|json| json[key] = value.clone(), |_| {});
        assert!(error.contains(key) && error.contains("adapter_config.json"), "{key}: {error}");
    }
    for value in [serde_json::json!(null), false.into(), "".into(), serde_json::json!({})] {
        assert_eq!(refused(|json| json["not_known_yet"] = value.clone(), |_| {}), "loaded");
    }
}

#[test]
fn a_tensor_that_does_not_fit_is_refused_by_name() {
    let a = "base_model.model.layers.0.q.lora_A.weight";
    let b = "base_model.model.layers.0.q.lora_B.weight";
    let error = |change: &dyn Fn(&mut StateDict)| refused(|_| {}, change);
    assert_eq!(error(&|_| {}), "loaded");
    let renamed = |to: &'static str| {
        error(&move |all| {
            let tensor = all.remove(a).unwrap();
            all.insert(to.to_owned(), tensor);
        })
    };
    assert!(error(&|all| drop(all.remove(a))).contains(a));
    assert!(error(&|all| drop(all.remove(b))).contains(b));
    for to in ["x", "model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_A.x.weight"]
    {
        assert!(renamed(to).contains(to), "{}", renamed(to));
    }
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &CPU).unwrap();
    for dims in [&[2, 6][..], &[3], &[3, 6, 1]] {
        let error = error(&|all| drop(all.insert(a.to_owned(), zeros(dims))));
        assert!(error.contains("layers.0.q.lora_A"), "{error}");
    }
    let wrong = error(&|all| drop(all.insert(b.to_owned(), zeros(&[8, 2]))));
    assert!(wrong.contains("layers.0.q.lora_A") && wrong.contains("[8, 2]"), "{wrong}");
    let extra = "base_model.model.layers.0.q.lora_magnitude_vector";
    assert!(error(&|all| drop(all.insert(extra.to_owned(), zeros(&[8])))).contains(extra));
    assert!(error(&|all| all.clear()).contains("adapter_model.safetensors"));
    let bias = "base_model.model.head.bias";
    assert!(error(&|all| drop(all.insert(bias.to_owned(), zeros(&[3])))).contains(bias));
}

#[test]
fn what_cannot_be_saved_is_refused_by_name() -> lora::Result<()> {
    let Sample { adapter, config, .. } = sample(false)?;
    let dir = tempfile::tempdir()?;
    let refused = |adapter: &StateDict, config: &PeftConfig| {
        peft::save_pretrained(dir.path(), adapter, config).unwrap_err().to_string()
    };
    let mut alone = adapter.clone();
    alone.remove("h.q.lora_B");
    assert!(refused(&alone, &config).contains("h.q.lora_B"));
    let unused = config.clone().with("nowhere", Kind::Linear);
    assert!(refused(&adapter, &unused).contains("nowhere"));
    let mut undeclared = config.clone();
    undeclared.layers.remove("qkv");
    assert!(refused(&adapter, &undeclared).contains("h.qkv.lora_A"));
    let mut head = adapter.clone();
    head.insert("head.weight".into(), Tensor::zeros(2, DType::F32, &CPU)?);
    assert!(refused(&head, &config).contains("head.weight"));
    assert!(refused(&StateDict::new(), &PeftConfig::default()).contains("without layers"));
    assert!(dir.path().read_dir()?.next().is_none());
    Ok(())
}
