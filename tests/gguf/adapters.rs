//! Adapters in llama.cpp's form.

use crate::fixture::*;
use crate::CPU;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};
use loralib::adapter::{AdapterConfig, LayerConfig};
use loralib::gguf::{load_adapter, save_adapter, File};
use loralib::layers::LayerKind;
use loralib::utils::StateDict;
use loralib::{LoraConfig, LoraWeights, Result};
use rand::Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const CFG: LoraConfig = LoraConfig { r: 4, lora_alpha: 12., ..LoraConfig::DEFAULT };

fn base(dir: &Path, architecture: &str, head: bool) -> File {
    File::open(write_model(dir, architecture, head, GgmlDType::Q8_0)).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// What llama.cpp adds to each weight of the file: `alpha / r · B·A`, with the factors of the embedding
/// flipped.
fn llama_cpp(path: &Path) -> BTreeMap<String, Tensor> {
    let file = File::open(path).unwrap();
    let Some(Value::F32(alpha)) = file.metadata().get("adapter.lora.alpha") else { panic!() };
    let weights = file.tensor_names().filter_map(|name| name.strip_suffix(".lora_a"));
    let update = |weight: &str| {
        let factor = |last| {
            let tensor = file.tensor(&format!("{weight}.{last}"), &CPU).unwrap();
            assert_eq!(tensor.dtype(), GgmlDType::F32);
            tensor.dequantize(&CPU).unwrap()
        };
        let (a, b) = (factor("lora_a"), factor("lora_b"));
        let r = b.dim(1).unwrap() as f64;
        let product = match weight {
            "token_embd.weight" => a.matmul(&b.t().unwrap()),
            _ => b.matmul(&a),
        };
        (weight.to_owned(), (product.unwrap() * (f64::from(*alpha) / r)).unwrap())
    };
    weights.map(update).collect()
}

/// What the layers of an adapter add to their weights, as the file orders its rows.
fn expected(
    architecture: &str,
    adapter: &StateDict,
    config: &AdapterConfig,
) -> BTreeMap<String, Tensor> {
    let names = &expected_names()[architecture];
    let a = adapter.keys().filter_map(|name| name.strip_suffix(".lora_A"));
    let update = |path: &str| {
        let (a, b) = (&adapter[&format!("{path}.lora_A")], &adapter[&format!("{path}.lora_B")]);
        let product = (b.matmul(a).unwrap() * config.lora_config(path).scaling()).unwrap();
        let product = match path.rsplit('.').next().unwrap() {
            "embed_tokens" => product.t().unwrap().contiguous().unwrap(),
            "q_proj" if architecture == "llama" => interleaved(&product, HEADS),
            "k_proj" if architecture == "llama" => interleaved(&product, KV_HEADS),
            _ => product,
        };
        (names[&format!("{path}.weight")].clone(), product)
    };
    a.map(update).collect()
}

fn assert_same_updates(ours: &BTreeMap<String, Tensor>, theirs: &BTreeMap<String, Tensor>) {
    assert!(ours.keys().eq(theirs.keys()));
    for (name, own) in ours {
        let diff = (own - &theirs[name]).unwrap().abs().unwrap().max_all().unwrap();
        let most = own.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(diff.to_scalar::<f32>().unwrap() <= 2e-6 * most, "{name}");
    }
}

#[test]
fn an_adapter_comes_back_to_the_bit() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapter.gguf");
    for architecture in expected_names().into_keys() {
        for head in [true, false] {
            let head = head && !matches!(&*architecture, "gemma" | "gemma2");
            let base = base(dir.path(), &architecture, head);
            let adapter = adapter(&architecture, head, |_| 4);
            save_adapter(&path, &LoraWeights::new(CFG, adapter.clone())?, &base)?;
            assert_same_updates(&llama_cpp(&path), &expected(&architecture, &adapter, &CFG.into()));
            let weights = load_adapter(&path, &base, &CPU)?;
            let (config, loaded) = (weights.config(), weights.state_dict());
            assert_eq!(config.lora, CFG);
            assert!(adapter.keys().eq(loaded.keys()), "{architecture}");
            for (name, tensor) in &adapter {
                assert_eq!(loaded[name].dims(), tensor.dims(), "{name}");
                assert_eq!(values(&loaded[name]), values(tensor), "{architecture} {name}");
                let embedding = name.contains("embed_tokens");
                let kind = if embedding { LayerKind::Embedding } else { LayerKind::Linear };
                let path = name.rsplit_once('.').unwrap().0;
                assert_eq!(config.kind(path), Some(&kind));
                assert_eq!(config.lora_config(path), CFG);
            }
            let bytes = fs::read(&path)?;
            save_adapter(&path, &weights, &base)?;
            assert_eq!(fs::read(&path)?, bytes);
        }
    }
    Ok(())
}

#[test]
fn every_layer_keeps_its_own_scaling() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapter.gguf");
    let base = base(dir.path(), "llama", true);
    let ranks = |path: &str| match path {
        path if path.ends_with("q_proj") => 2,
        path if path.ends_with("k_proj") => 8,
        _ => 4,
    };
    let adapter = adapter("llama", true, ranks);
    let layer = |r, lora_alpha| LayerConfig { r, lora_alpha, ..Default::default() };
    for (lora_alpha, rslora, own) in [
        (12., false, None),
        (0.1, true, None),
        (12., false, Some(3.)),
        (1e-3, true, Some(-7.)),
        (1., false, Some(0.)),
    ] {
        let mut config = AdapterConfig::from(LoraConfig { lora_alpha, rslora, ..CFG });
        config.layers.insert("q_proj".into(), layer(Some(2), own));
        config.layers.insert("k_proj".into(), layer(Some(8), None));
        config.layers.insert("layers.1.mlp.up_proj".into(), layer(None, own));
        save_adapter(&path, &LoraWeights::new(&config, adapter.clone())?, &base)?;
        let updates = expected("llama", &adapter, &config);
        assert_same_updates(&llama_cpp(&path), &updates);
        let weights = load_adapter(&path, &base, &CPU)?;
        let (config, loaded) = (weights.config(), weights.state_dict());
        assert_same_updates(&expected("llama", &loaded, &config), &updates);
        let exact = !rslora && own.is_none_or(|own| own == 3. || own == 0.);
        for (name, tensor) in adapter.iter().filter(|(name, _)| name.ends_with("lora_A") && exact) {
            assert_eq!(values(&loaded[name]), values(tensor), "{name}");
        }
    }
    Ok(())
}

#[test]
fn splits_are_saved_as_one_linear_layer() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapter.gguf");
    let base = base(dir.path(), "phi3", true);
    let module = "model.layers.1.self_attn.qkv_proj";
    // 64 outputs of q and 32 of v, but none of k
    let (a, b) = (random(1, &[8, HIDDEN]), random(2, &[96, 4]));
    let adapter = StateDict::from([
        (format!("{module}.lora_A"), a.clone()),
        (format!("{module}.lora_B"), b.clone()),
    ]);
    let kind = LayerKind::MergedSplits(vec![(64, true), (32, false), (32, true)]);
    let config = AdapterConfig::from(CFG).with_layer("qkv_proj", kind);
    save_adapter(&path, &LoraWeights::new(config, adapter)?, &base)?;
    let update = &llama_cpp(&path)["blk.1.attn_qkv.weight"];
    let split = |rank: usize, from, rows| b.narrow(0, from, rows)?.matmul(&a.narrow(0, rank, 4)?);
    let none = Tensor::zeros((32, HIDDEN), DType::F32, &CPU)?;
    let expected = (Tensor::cat(&[split(0, 0, 64)?, none, split(4, 64, 32)?], 0)? * 3.)?;
    let diff = (update - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(diff < 1e-5, "{diff}");
    Ok(())
}

#[test]
fn what_llama_cpp_cannot_take_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.gguf");
    let (tied, own) = (dir.path().join("tied"), dir.path().join("own"));
    [&tied, &own].iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let (tied, own) = (base(&tied, "llama", false), base(&own, "llama", true));
    let q = "model.layers.0.self_attn.q_proj";
    let pair = |path: &str, a: &[usize], b: &[usize]| {
        StateDict::from([
            (format!("{path}.lora_A"), random(0, a)),
            (format!("{path}.lora_B"), random(1, b)),
        ])
    };
    let good = pair(q, &[4, 64], &[64, 4]);
    let with = |name: &str, tensor: Tensor| {
        let mut adapter = good.clone();
        adapter.insert(name.to_owned(), tensor);
        adapter
    };
    let mut alone = good.clone();
    alone.remove(&format!("{q}.lora_A"));
    let nan = (random(0, &[4, 64]) / 0.).unwrap();
    let bias = "model.layers.0.self_attn.q_proj.bias";
    let magnitude = "model.layers.0.self_attn.q_proj.lora_magnitude_vector";
    let peft = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let linear = AdapterConfig::from(CFG);
    let declared = |name: &str, kind| AdapterConfig::from(CFG).with_layer(name, kind);
    let conv = LayerKind::Conv1d { groups: 1 };
    let none = AdapterConfig::from(LoraConfig { lora_alpha: 0., ..CFG });
    let dora = AdapterConfig::from(LoraConfig { use_dora: true, ..CFG });
    let embedding = pair("model.embed_tokens", &[4, 10], &[64, 4]);
    for (adapter, config, reason) in [
        (StateDict::new(), linear.clone(), "empty"),
        (with(peft, random(0, &[4, 64])), linear.clone(), "formats::peft::load"),
        (alone, linear.clone(), "q_proj.lora_A\": it is missing"),
        (good.clone(), declared("v_proj", LayerKind::Linear), "v_proj"),
        (good.clone(), LoraConfig { r: 8, ..CFG }.into(), "r = 8"),
    ] {
        let error = LoraWeights::new(config, adapter).unwrap_err().to_string();
        assert!(error.contains(reason), "{error:?} {reason:?}");
    }
    let cases = [
        (&own, with(bias, random(0, &[64])), linear.clone(), bias),
        (&own, with(magnitude, random(0, &[64])), dora, "merge it into the base"),
        (&own, with("lm_head.weight", random(0, &[10, 64])), linear.clone(), "\"lm_head.weight\""),
        (
            &own,
            pair("model.layers.2.mlp.up_proj", &[4, 64], &[96, 4]),
            linear.clone(),
            "no weight for it",
        ),
        (&own, pair("model.norm", &[4, 64], &[64, 4]), linear.clone(), "model.norm"),
        (&tied, pair("lm_head", &[4, 64], &[10, 4]), linear.clone(), "no weight for it"),
        (&tied, embedding.clone(), linear.clone(), "llama.cpp stops"),
        (&own, embedding, declared("embed_tokens", LayerKind::Linear), "declared as a Linear"),
        (&own, good.clone(), declared("q_proj", LayerKind::Embedding), "declared as a Embedding"),
        (&own, good.clone(), declared("q_proj", conv), "declared as a Conv1d"),
        (&own, good.clone(), LoraConfig { r: 2, ..CFG }.into(), "rank 2"),
        (&own, good.clone(), none, "alpha other than 0"),
        (&own, pair(q, &[4, 32], &[64, 4]), linear.clone(), "[4, 32]"),
        (&own, pair(q, &[4, 64], &[32, 4]), linear.clone(), "[32, 4]"),
        (&own, with(&format!("{q}.lora_A"), nan), linear.clone(), "not finite"),
    ];
    for (base, adapter, config, reason) in cases {
        let weights = LoraWeights::new(config, adapter).unwrap();
        let error = save_adapter(&path, &weights, base).unwrap_err().to_string();
        assert!(error.contains("adapter.gguf") && error.contains(reason), "{error:?} {reason:?}");
        assert!(!path.exists());
    }
    save_adapter(&path, &LoraWeights::new(linear, good).unwrap(), &own).unwrap();
}

/// A key of the metadata with another value, or without one.
type Change = (&'static str, Option<Value>);

type Tensors = Vec<(&'static str, QTensor)>;

/// Metadata of a valid adapter, with some keys replaced or removed.
fn adapter_metadata(changes: &[Change]) -> BTreeMap<String, Value> {
    let mut metadata = BTreeMap::from([
        ("general.architecture".to_owned(), text("llama")),
        ("general.type".to_owned(), text("adapter")),
        ("adapter.type".to_owned(), text("lora")),
        ("adapter.lora.alpha".to_owned(), Value::F32(12.)),
    ]);
    for (key, value) in changes {
        metadata.remove(*key);
        metadata.extend(value.clone().map(|value| (key.to_string(), value)));
    }
    metadata
}

#[test]
fn an_adapter_of_another_model_or_form_does_not_load() {
    let dir = tempfile::tempdir().unwrap();
    let (path, base) = (dir.path().join("adapter.gguf"), base(dir.path(), "llama", true));
    let tensor = |dims: &[usize]| QTensor::quantize(&random(0, dims), GgmlDType::F32).unwrap();
    let (a, b) = ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b");
    let good = || vec![(a, tensor(&[4, 64])), (b, tensor(&[64, 4]))];
    let with =
        |name, dims: &[usize]| good().into_iter().chain([(name, tensor(dims))]).collect::<Vec<_>>();
    let ids = Value::Array(vec![Value::U32(1)]);
    let nan = || QTensor::quantize(&(random(0, &[64, 4]) / 0.).unwrap(), GgmlDType::F32).unwrap();
    let cases: Vec<(Vec<Change>, Tensors, &str)> = vec![
        (vec![("general.architecture", Some(text("qwen2")))], good(), "\"qwen2\""),
        (vec![("general.type", Some(text("model")))], good(), "\"general.type\" is \"model\""),
        (vec![("general.type", None)], good(), "\"general.type\" is missing"),
        (vec![("adapter.type", Some(text("dora")))], good(), "\"adapter.type\""),
        (vec![("adapter.lora.alpha", Some(text("1")))], good(), "\"adapter.lora.alpha\""),
        (
            vec![("adapter.lora.alpha", Some(Value::F32(f32::NAN)))],
            good(),
            "\"adapter.lora.alpha\"",
        ),
        (vec![("adapter.alora.invocation_tokens", Some(ids))], good(), "activated LoRA"),
        (vec![], vec![], "no lora_a and lora_b"),
        (vec![], good().into_iter().take(1).collect(), "\"blk.0.attn_q.weight\": it has only one"),
        (
            vec![],
            with("blk.0.attn_norm.weight", &[64]),
            "\"blk.0.attn_norm.weight\": it is neither",
        ),
        (vec![], with("blk.9.attn_q.weight.lora_a", &[4, 64]), "only one"),
        (vec![], vec![(a, tensor(&[4, 32])), (b, tensor(&[64, 4]))], "[4, 32]"),
        (vec![], vec![(a, tensor(&[4, 64])), (b, tensor(&[64, 8]))], "[64, 8]"),
        (vec![], vec![(a, tensor(&[64])), (b, tensor(&[64, 4]))], "[64]"),
        (vec![], vec![(a, tensor(&[4, 64])), (b, nan())], "not finite"),
        (
            vec![],
            vec![
                ("blk.9.ffn_up.weight.lora_a", tensor(&[4, 64])),
                ("blk.9.ffn_up.weight.lora_b", tensor(&[96, 4])),
            ],
            "lacks its weight",
        ),
        (
            vec![],
            vec![
                ("output_norm.weight.lora_a", tensor(&[4, 64])),
                ("output_norm.weight.lora_b", tensor(&[64, 4])),
            ],
            "\"output_norm.weight\": it is not a matrix",
        ),
    ];
    for (changes, tensors, reason) in cases {
        let tensors = tensors.into_iter().map(|(name, t)| (name.to_owned(), t)).collect();
        write_file(&path, &adapter_metadata(&changes), &tensors);
        let error = load_adapter(&path, &base, &CPU).unwrap_err().to_string();
        assert!(error.contains("adapter.gguf") && error.contains(reason), "{error:?} {reason:?}");
    }
}

#[test]
fn without_an_alpha_the_factors_are_not_scaled() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (path, base) = (dir.path().join("adapter.gguf"), base(dir.path(), "llama", true));
    for alpha in [None, Some(Value::F32(0.))] {
        let tensor = |dims: &[usize], dtype| QTensor::quantize(&random(0, dims), dtype);
        let tensors = BTreeMap::from([
            ("blk.0.ffn_up.weight.lora_a".to_owned(), tensor(&[4, 64], GgmlDType::Q8_0)?),
            ("blk.0.ffn_up.weight.lora_b".to_owned(), tensor(&[96, 4], GgmlDType::F16)?),
        ]);
        write_file(&path, &adapter_metadata(&[("adapter.lora.alpha", alpha)]), &tensors);
        let weights = load_adapter(&path, &base, &CPU)?;
        assert_eq!(weights.config().lora_config("model.layers.0.mlp.up_proj").scaling(), 1.);
        assert_eq!(weights.state_dict()["model.layers.0.mlp.up_proj.lora_B"].dtype(), DType::F32);
    }
    Ok(())
}

#[test]
fn damaged_adapters_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let (path, base) = (dir.path().join("damaged.gguf"), base(dir.path(), "llama", true));
    let mut adapter = adapter("llama", true, |_| 1);
    adapter.retain(|name, _| {
        ["embed_tokens", "0.self_attn.q_proj", "1.mlp.up_proj"]
            .iter()
            .any(|part| name.contains(part))
    });
    let weights = LoraWeights::new(LoraConfig { r: 1, ..CFG }, adapter.clone()).unwrap();
    save_adapter(&path, &weights, &base).unwrap();
    let good = fs::read(&path).unwrap();
    let header = good.len() - adapter.values().map(|t| t.elem_count() * 4).sum::<usize>() - 6 * 16;
    let (mut rng, mut loaded) = (ChaCha8Rng::seed_from_u64(0), 0);
    for i in 0..10_000 {
        let mut bad = good.clone();
        match i % 3 {
            0 => bad.truncate(rng.random_range(0..header)),
            1 => bad[rng.random_range(0..header)] ^= 1 << rng.random_range(0..8),
            _ => bad[rng.random_range(0..header)] = rng.random(),
        }
        replace(&path, &bad);
        match load_adapter(&path, &base, &CPU) {
            Ok(weights) => {
                let (config, tensors) = (weights.config(), weights.state_dict());
                assert!(i % 3 > 0 && tensors.len() % 2 == 0 && config.lora.r == 1);
                loaded += 1;
            }
            Err(error) => assert!(error.to_string().contains("damaged.gguf"), "{error}"),
        }
    }
    println!("{loaded} of 10000");
    assert!(loaded > 100);
}
