//! Adapters folded into a base by name, from tensors and from files; and sums of adapters.

mod common;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use common::{bits, difference, rnd};
use lora::layers::LayerKind;
use lora::AdapterConfig;
use lora::{LoraConfig, LoraModule, StateDict};
use loralib as lora;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

const CPU: Device = Device::Cpu;

fn tensor(seed: u64, dims: &[usize], dtype: DType) -> Tensor {
    rnd(seed, dims, dtype).unwrap().to_device(&CPU).unwrap()
}

fn cfg() -> LoraConfig {
    LoraConfig { r: 2, lora_alpha: 3., ..Default::default() }
}

/// A base of 3 weights in a dtype, and an adapter for one with a bias of another.
fn model(dtype: DType) -> (StateDict, StateDict) {
    let base = [
        ("a.weight", tensor(1, &[5, 4], dtype)),
        ("a.bias", tensor(2, &[5], dtype)),
        ("b.weight", tensor(3, &[4, 4], dtype)),
        ("norm.weight", tensor(4, &[4], DType::F32)),
        ("ids", Tensor::new(&[3u32, 4], &CPU).unwrap()),
    ];
    let adapter = [
        ("a.lora_A", tensor(5, &[2, 4], DType::F32)),
        ("a.lora_B", tensor(6, &[5, 2], DType::F32)),
        ("a.bias", tensor(7, &[5], DType::F32)),
    ];
    let dict = |all: &[(&str, Tensor)]| all.iter().map(|(n, t)| ((*n).into(), t.clone())).collect();
    (dict(&base), dict(&adapter))
}

#[test]
fn every_tensor_of_the_base_is_there_and_the_adapted_one_is_the_layers_merged_weight(
) -> lora::Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let (base, adapter) = model(dtype);
        let merged = lora::merge_into(&base, &adapter, cfg())?;
        assert!(merged.keys().eq(base.keys()));
        for (name, t) in &merged {
            assert_eq!((t.dtype(), t.dims()), (base[name].dtype(), base[name].dims()), "{name}");
            if !name.starts_with("a.") {
                assert_eq!(bits(t)?, bits(&base[name])?, "{name}");
            }
        }
        let all = base.iter().chain(&adapter).map(|(n, t)| (n.clone(), t.clone()));
        let vb = VarBuilder::from_tensors(all.collect(), dtype, &CPU);
        let cfg = LoraConfig { lora_dtype: Some(DType::F32), ..cfg() };
        let layer = lora::linear_no_bias(4, 5, cfg, vb.pp("a"))?;
        assert_eq!(bits(&merged["a.weight"])?, bits(&layer.merged_weight()?)?, "{dtype:?}");
        assert_eq!(bits(&merged["a.bias"])?, bits(&adapter["a.bias"].to_dtype(dtype)?)?);
    }
    Ok(())
}

#[test]
fn a_weight_that_lies_transposed_and_a_second_name_are_found() -> lora::Result<()> {
    let (base, mut adapter) = model(DType::F32);
    let expected = lora::merge_into(&base, &adapter, cfg())?["a.weight"].clone();
    let mut transposed = base.clone();
    transposed.insert("a.weight".into(), base["a.weight"].t()?.contiguous()?);
    let merged = lora::merge_into(&transposed, &adapter, cfg())?;
    assert_eq!(difference(&merged["a.weight"].t()?, &expected)?, 0.);
    let mut second = base;
    let (w, b) = (second.remove("a.weight").unwrap(), second.remove("a.bias").unwrap());
    second.insert("a.conv.weight".into(), w);
    second.insert("a.conv.bias".into(), b);
    let merged = lora::merge_into(&second, &adapter, cfg())?;
    assert_eq!(difference(&merged["a.conv.weight"], &expected)?, 0.);
    assert_eq!(bits(&merged["a.conv.bias"])?, bits(&adapter.remove("a.bias").unwrap())?);
    Ok(())
}

#[test]
fn a_misfit_with_the_base_is_an_error_by_name() {
    let (base, adapter) = model(DType::F32);
    let refused = |adapter: &StateDict, cfg: AdapterConfig| {
        lora::merge_into(&base, adapter, cfg).unwrap_err().to_string()
    };
    let with = |name: &str, t: Tensor| {
        let mut adapter = adapter.clone();
        adapter.insert(name.into(), t);
        adapter
    };
    let plain = || AdapterConfig::from(cfg());
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &CPU).unwrap();
    assert!(refused(&with("head.weight", zeros(&[2])), plain()).contains("head.weight"));
    let pefts = "base_model.model.a.lora_A.weight";
    assert!(refused(&with(pefts, zeros(&[2, 4])), plain()).contains("`peft::load_pretrained`"));
    assert!(refused(&with("x.lora_A", zeros(&[2, 4])), plain()).contains("x.lora_A"));
    assert!(refused(&with("a.bias", zeros(&[2])), plain()).contains("a.bias"));
    assert!(refused(&with("a.lora_A", zeros(&[2, 3])), plain()).contains("a.weight"));
    assert!(refused(&with("a.lora_B", zeros(&[4, 2])), plain()).contains("a.weight"));
    assert!(refused(&with("a.weight", zeros(&[5, 4])), plain()).contains("a.weight"));
    let nan = Tensor::full(f32::NAN, (2, 4), &CPU).unwrap();
    assert!(refused(&with("a.lora_A", nan), plain()).contains("a.weight"));
    assert!(refused(&StateDict::new(), plain()).contains("empty"));
    assert!(refused(&adapter, LoraConfig { r: 0, ..cfg() }.into()).contains("r = 0"));
    for r in [1, 4] {
        let error = refused(&adapter, LoraConfig { r, ..cfg() }.into());
        let words = format!("rank is 2, the configuration has r = {r}");
        assert!(error.contains("a.weight") && error.contains(&words), "{error}");
    }
    assert!(refused(&adapter, plain().with_layer("b", LayerKind::Embedding)).contains("b.lora_A"));
    assert!(refused(&adapter, plain().with_layer("a", LayerKind::Conv2d { groups: 1 }))
        .contains("Conv2d"));
}

fn write(path: &Path, tensors: &[(&str, &Tensor)]) {
    let all: HashMap<_, _> = tensors.iter().map(|(n, t)| (n.to_string(), (*t).clone())).collect();
    candle_core::safetensors::save(&all, path).unwrap();
}

#[test]
fn a_sharded_base_is_merged_shard_by_shard_under_its_names() -> lora::Result<()> {
    let (base, adapter) = model(DType::BF16);
    let expected = lora::merge_into(&base, &adapter, cfg())?;
    let dir = tempfile::tempdir()?;
    let from = dir.path().join("base");
    fs::create_dir(&from)?;
    let (mut map, mut size) = (serde_json::Map::new(), 0);
    let names: Vec<_> = base.keys().map(String::as_str).collect();
    for (i, names) in names.chunks(2).enumerate() {
        let shard = format!("model-{i}.safetensors");
        write(&from.join(&shard), &names.iter().map(|n| (*n, &base[*n])).collect::<Vec<_>>());
        for name in names {
            map.insert(name.to_string(), shard.clone().into());
            size += base[*name].elem_count() * base[*name].dtype().size_in_bytes();
        }
    }
    let index = from.join("model.safetensors.index.json");
    fs::write(&index, serde_json::json!({"metadata": {}, "weight_map": map}).to_string())?;
    for base in [from.clone(), index.clone()] {
        let out = tempfile::tempdir()?;
        let mut last = None;
        lora::merge_files(&base, &adapter, cfg(), out.path(), |p| last = Some(p))?;
        let last = last.unwrap();
        assert_eq!((last.done, last.total), (size as u64, size as u64));
        let whole = lora::read_state_dict(out.path(), &CPU)?.tensors;
        assert!(whole.keys().eq(expected.keys()));
        assert!(lora::merge_into(&whole, &[].into(), cfg()).is_err(), "an empty adapter");
        let mut seen = 0;
        for shard in ["model-0", "model-1", "model-2"] {
            let file = out.path().join(format!("{shard}.safetensors"));
            for (name, t) in lora::read_state_dict(file, &CPU)?.tensors {
                assert_eq!(bits(&t)?, bits(&expected[&name])?, "{name}");
                assert_eq!(t.dtype(), expected[&name].dtype());
                seen += 1;
            }
        }
        assert_eq!(seen, expected.len());
        assert_eq!(fs::read(out.path().join(index.file_name().unwrap()))?, fs::read(&index)?);
    }
    let whole = lora::read_state_dict(&from, &CPU)?.tensors;
    for (name, t) in lora::merge_into(&whole, &adapter, cfg())? {
        assert_eq!(bits(&t)?, bits(&expected[&name])?, "{name}");
    }
    let before = fs::read(from.join("model-0.safetensors"))?;
    let own = lora::merge_files(&from, &adapter, cfg(), &from, |_| {}).unwrap_err().to_string();
    assert!(own.contains("own folder"), "{own}");
    assert_eq!(fs::read(from.join("model-0.safetensors"))?, before);
    let bad = index.with_file_name("bad.index.json");
    fs::write(&bad, r#"{"weight_map": {"a.weight": "../secret.safetensors"}}"#)?;
    let error = lora::read_state_dict(&bad, &CPU).unwrap_err().to_string();
    assert!(error.contains("secret"), "{error}");
    Ok(())
}

#[test]
fn one_file_keeps_its_header_and_an_error_leaves_the_old_output() -> lora::Result<()> {
    let (base, mut adapter) = model(DType::F32);
    let dir = tempfile::tempdir()?;
    let (from, to) = (dir.path().join("base.safetensors"), dir.path().join("out.safetensors"));
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    fs::write(&from, safetensors::serialize(&base, metadata).unwrap())?;
    lora::merge_files(&from, &adapter, cfg(), &to, |_| {})?;
    let (old, new) = (fs::read(&from)?, fs::read(&to)?);
    let start = 8 + u64::from_le_bytes(old[..8].try_into().unwrap()) as usize;
    assert_eq!(old[..start], new[..start]);
    assert_ne!(old[start..], new[start..]);
    adapter.insert("a.lora_A".into(), Tensor::full(f32::NAN, (2, 4), &CPU)?);
    assert!(lora::merge_files(&from, &adapter, cfg(), &to, |_| {}).is_err());
    assert_eq!(fs::read(&to)?, new);
    assert_eq!(dir.path().read_dir()?.count(), 2, "no temporary file is left");
    Ok(())
}

#[test]
fn a_weighted_sum_changes_the_weight_by_the_sum_of_the_changes() -> lora::Result<()> {
    let weights = [(0.7, 2usize, 10u64), (-0.4, 3, 20), (1.5, 1, 30)];
    let config = |r: usize| {
        // One scaling for all: 1.5.
        AdapterConfig::from(LoraConfig { r, lora_alpha: 1.5 * r as f64, ..Default::default() })
            .with_layer("qkv", LayerKind::MergedLinear(vec![true, false, true]))
    };
    let base: StateDict = [("q", [6, 4]), ("qkv", [9, 4])]
        .map(|(path, dims)| (format!("{path}.weight"), tensor(1, &dims, DType::F64)))
        .into();
    let adapters: Vec<StateDict> = weights
        .iter()
        .map(|&(_, r, seed)| {
            let all = [
                ("q.lora_A", [r, 4]),
                ("q.lora_B", [6, r]),
                ("qkv.lora_A", [2 * r, 4]),
                ("qkv.lora_B", [6, r]),
            ];
            let all = all.iter().enumerate();
            let named = |(i, (n, d)): (usize, &(&str, [usize; 2]))| {
                (n.to_string(), tensor(seed + i as u64, d, DType::F64))
            };
            all.map(named).collect()
        })
        .collect();
    let pairs: Vec<_> = adapters.iter().zip(weights).map(|(a, (w, ..))| (a, w)).collect();
    let sum = lora::add_weighted(&pairs)?;
    assert_eq!(sum["qkv.lora_A"].dims(), [12, 4]);
    let merged = lora::merge_into(&base, &sum, config(6))?;
    for (name, w) in &base {
        let mut expected = w.clone();
        for ((adapter, weight), (_, r, _)) in pairs.iter().zip(weights) {
            let own = lora::merge_into(&base, adapter, config(r))?;
            expected = (expected + ((&own[name] - w)? * *weight)?)?;
        }
        assert!(difference(&merged[name], &expected)? < 1e-14, "{name}");
    }
    let mut other = adapters[1].clone();
    other.remove("q.lora_A");
    assert!(lora::add_weighted(&[(&adapters[0], 1.), (&other, 1.)]).is_err());
    other.remove("q.lora_B");
    assert!(lora::add_weighted(&[(&adapters[0], 1.), (&other, 1.)]).is_err());
    assert!(lora::add_weighted(&[(&adapters[0], f64::NAN)]).is_err());
    assert!(lora::add_weighted(&[]).is_err());
    Ok(())
}

#[test]
fn swapping_an_adapter_takes_effect_at_the_next_eval() -> lora::Result<()> {
    let vars = candle_nn::VarMap::new();
    let base = VarBuilder::zeros(DType::F32, &CPU);
    let mut layer =
        lora::linear_no_bias(4, 5, cfg(), lora::var_builder(base, &vars, lora::Bias::None))?;
    for seed in [1, 2] {
        let adapter = StateDict::from([
            ("lora_A".to_owned(), tensor(seed, &[2, 4], DType::F32)),
            ("lora_B".to_owned(), tensor(seed + 9, &[5, 2], DType::F32)),
        ]);
        let report = lora::load_state_dict(&vars, &adapter, lora::Strict::Yes)?;
        assert_eq!(report.loaded.len(), 2);
        layer.eval()?;
        let base = StateDict::from([("weight".to_owned(), layer.weight().clone())]);
        let merged = lora::merge_into(&base, &adapter, cfg())?;
        assert_eq!(bits(&layer.merged_weight()?)?, bits(&merged["weight"])?);
    }
    Ok(())
}

/// `cargo test --release --test merge -- --ignored --nocapture` prints how long a swap takes.
#[test]
#[ignore = "a measurement"]
fn time_to_swap_an_adapter() -> lora::Result<()> {
    let (vars, dim) = (candle_nn::VarMap::new(), 1024);
    let base = VarBuilder::zeros(DType::F32, &CPU);
    let vb = lora::var_builder(base, &vars, lora::Bias::None);
    let cfg = LoraConfig { r: 8, ..cfg() };
    let mut layers = vec![];
    for i in 0..12 {
        layers.push(lora::merged_linear_no_bias(
            dim,
            3 * dim,
            &[true, false, true],
            cfg,
            vb.pp(format!("{i}.qkv")),
        )?);
    }
    let adapter = lora::lora_state_dict(&vars, lora::Bias::None)?;
    layers.eval()?;
    let start = std::time::Instant::now();
    for _ in 0..5 {
        let _ = lora::load_state_dict(&vars, &adapter, lora::Strict::Yes)?;
        layers.eval()?;
    }
    println!("a swap takes {:?}", start.elapsed() / 5);
    Ok(())
}
