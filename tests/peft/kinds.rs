//! Every kind of layer as PEFT's factors, and back.

use crate::common::{bits, difference, rnd};
use crate::CPU;
use candle_core::{DType, Tensor};
use lora::adapter::AdapterConfig;
use lora::formats::peft;
use lora::layers::LayerKind;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;

pub struct Sample {
    pub base: StateDict,
    pub adapter: StateDict,
    pub config: AdapterConfig,
}

impl Sample {
    pub fn weights(&self) -> lora::Result<LoraWeights> {
        LoraWeights::new(&self.config, self.adapter.clone())
    }
}

/// A path, and the shapes of W, A and B.
type Shapes<'a> = (&'a str, &'a [usize], [usize; 2], [usize; 2]);

/// A layer of each kind, with factors of rank 2.
pub fn sample(rslora: bool) -> lora::Result<Sample> {
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
    let config = AdapterConfig::from(lora)
        .with_layer("qkv", LayerKind::MergedLinear(vec![true, false, true]))
        .with_layer("gqa", LayerKind::MergedSplits(vec![(4, true), (2, false), (2, true)]))
        .with_layer("wte", LayerKind::Embedding)
        .with_layer("c1", LayerKind::Conv1d { groups: 1 })
        .with_layer("c2", LayerKind::Conv2d { groups: 1 })
        .with_layer("c3", LayerKind::Conv3d { groups: 1 })
        .with_layer("one", LayerKind::Conv2d { groups: 1 });
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

/// ΔW from PEFT's file by PEFT's formula, independent of loralib's factors.
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
fn every_kind_keeps_its_update() -> lora::Result<()> {
    for rslora in [false, true] {
        let sample = sample(rslora)?;
        let (base, weights) = (&sample.base, sample.weights()?);
        let dir = tempfile::tempdir()?;
        peft::save(dir.path(), &weights)?;
        let merged = merge_into(base, &weights)?;
        let file = dir.path().join("adapter_model.safetensors");
        let file = lora::read_state_dict(file, &CPU)?.tensors;
        let json = std::fs::read(dir.path().join("adapter_config.json"))?;
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        for (name, w) in base {
            let path = name.strip_suffix(".weight").unwrap();
            let own = |pattern: &str, common: &str| {
                json[pattern].get(path).unwrap_or(&json[common]).as_f64().unwrap()
            };
            let (r, alpha) = (own("rank_pattern", "r"), own("alpha_pattern", "lora_alpha"));
            let scaling = alpha / if rslora { r.sqrt() } else { r };
            let apart = difference(&(w + delta(&file, path, scaling)?)?, &merged[name])?;
            assert!(apart < 1e-6, "{path}: {apart}");
        }
        // Undeclared merged layers load as linear ones, with the same update.
        let loaded = peft::load(dir.path(), &CPU)?;
        for (name, tensor) in merge_into(base, &loaded)? {
            assert!(difference(&tensor, &merged[&name])? < 1e-6, "{name}");
        }
        assert_eq!(loaded.config().lora_config("h.qkv").r, 4);
    }
    Ok(())
}

#[test]
fn saved_adapters_round_trip_bit_for_bit() -> lora::Result<()> {
    for rslora in [false, true] {
        let sample = sample(rslora)?;
        let Sample { adapter, config, .. } = &sample;
        let dir = tempfile::tempdir()?;
        peft::save(dir.path(), &sample.weights()?)?;
        let weights = peft::load(dir.path(), &CPU)?
            .with_kind("qkv", LayerKind::MergedLinear(vec![true, false, true]))?
            .with_kind("gqa", LayerKind::MergedSplits(vec![(4, true), (2, false), (2, true)]))?;
        let (loaded, tensors) = (weights.config(), weights.state_dict());
        assert!(tensors.keys().eq(adapter.keys()));
        for (name, tensor) in &tensors {
            assert_eq!(tensor.dims(), adapter[name].dims(), "{name}");
            assert_eq!(bits(tensor)?, bits(&adapter[name])?, "{name}");
            let path = name.rsplit_once('.').unwrap().0;
            let (own, given) = (loaded.lora_config(path), config.lora_config(path));
            assert_eq!(own.r, given.r, "{path}");
            assert!((own.scaling() / given.scaling() - 1.).abs() < 1e-15, "{path}");
        }
    }
    Ok(())
}

#[test]
fn equal_ranks_need_no_pattern() -> lora::Result<()> {
    let Sample { mut adapter, config, .. } = sample(false)?;
    adapter.retain(|name, _| name.starts_with("h.qkv"));
    let config = AdapterConfig {
        layers: config.layers.into_iter().filter(|(module, _)| module == "qkv").collect(),
        ..config
    };
    let dir = tempfile::tempdir()?;
    peft::save(dir.path(), &LoraWeights::new(config, adapter)?)?;
    let json = std::fs::read(dir.path().join("adapter_config.json"))?;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!((&json["r"], &json["lora_alpha"]), (&4.into(), &6.into()));
    assert_eq!(json["rank_pattern"], serde_json::json!({}));
    assert_eq!(json["target_modules"], serde_json::json!(["h.qkv"]));
    Ok(())
}

#[test]
fn one_rank_pads_smaller_factors() -> lora::Result<()> {
    for rslora in [false, true] {
        let Sample { base, adapter, config } = sample(rslora)?;
        let config = AdapterConfig { one_rank: true, ..config };
        let weights = LoraWeights::new(&config, adapter.clone())?;
        let dir = tempfile::tempdir()?;
        peft::save(dir.path(), &weights)?;
        let json = std::fs::read(dir.path().join("adapter_config.json"))?;
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["r"], 18);
        assert_eq!(json["rank_pattern"], serde_json::json!({}));
        assert_eq!(json["alpha_pattern"], serde_json::json!({}));
        let merged = merge_into(&base, &weights)?;
        for (name, tensor) in merge_into(&base, &peft::load(dir.path(), &CPU)?)? {
            assert!(difference(&tensor, &merged[&name])? < 1e-6, "{name}");
        }
        let mut other = config;
        other.layers.entry("wte".into()).or_default().lora_alpha = Some(9.);
        let other = LoraWeights::new(other, adapter)?;
        let error = peft::save(dir.path(), &other).unwrap_err().to_string();
        assert!(error.contains("wte"), "{error}");
    }
    Ok(())
}
