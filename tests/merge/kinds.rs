//! The kind of a layer determines how its update is added to a square weight.

use crate::common::{bits, difference};
use crate::{cfg, tensor, CPU};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use lora::adapter::{AdapterConfig, LayerConfig};
use lora::layers::LayerKind;
use lora::merge::{merge_files, merge_into};
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;

fn base() -> StateDict {
    [("h.q.weight".to_owned(), tensor(1, &[4, 4], DType::F32))].into()
}

fn tensors() -> StateDict {
    let factor = |seed, name: &str, dims: &[usize]| (name.into(), tensor(seed, dims, DType::F32));
    [factor(2, "h.q.lora_A", &[2, 4]), factor(3, "h.q.lora_B", &[4, 2])].into()
}

fn adapter(config: impl Into<AdapterConfig>) -> lora::Result<LoraWeights> {
    LoraWeights::new(config, tensors())
}

fn declared(kind: LayerKind, fan_in_fan_out: Option<bool>) -> AdapterConfig {
    let mut config = AdapterConfig::from(cfg());
    let layer = LayerConfig { kind: Some(kind), fan_in_fan_out, ..Default::default() };
    config.layers.insert("q".to_owned(), layer);
    config
}

/// A configuration of each kind, with the merged weight of the layer itself.
fn by_the_layer() -> lora::Result<[(AdapterConfig, Tensor); 3]> {
    let all = base().into_iter().chain(tensors()).collect();
    let vb = VarBuilder::from_tensors(all, DType::F32, &CPU).pp("h.q");
    let transposed = LoraConfig { fan_in_fan_out: true, ..cfg() };
    Ok([
        (
            declared(LayerKind::Linear, None),
            lora::linear_no_bias(4, 4, cfg(), vb.clone())?.merged_weight()?,
        ),
        (
            declared(LayerKind::Linear, Some(true)),
            lora::linear_no_bias(4, 4, transposed, vb.clone())?.merged_weight()?,
        ),
        (declared(LayerKind::Embedding, None), lora::embedding(4, 4, cfg(), vb)?.merged_weight()?),
    ])
}

#[test]
fn square_weight_of_an_undeclared_layer_is_an_error() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let [from, to] = ["base.safetensors", "out.safetensors"].map(|name| dir.path().join(name));
    candle_core::safetensors::save(&base().into_iter().collect(), &from)?;
    for error in [
        merge_into(&base(), &adapter(cfg())?).unwrap_err(),
        merge_files(&from, &adapter(cfg())?, &to, |_| {}).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains("\"h.q.weight\"") && error.contains("with_layer"), "{error}");
    }
    assert!(!to.exists());
    Ok(())
}

#[test]
fn declared_square_weight_merges_as_in_its_layer() -> lora::Result<()> {
    let all = by_the_layer()?;
    for (config, expected) in &all {
        let merged = merge_into(&base(), &adapter(config)?)?;
        assert_eq!(bits(&merged["h.q.weight"])?, bits(expected)?, "{:?}", config.layers);
    }
    // The orientations differ, and an embedding's is the transposed one.
    assert!(difference(&all[0].1, &all[1].1)? > 0.1);
    assert_eq!(bits(&all[1].1)?, bits(&all[2].1)?);
    Ok(())
}

#[test]
fn fan_in_fan_out_of_the_adapter_needs_no_kind() -> lora::Result<()> {
    let [_, (_, expected), _] = by_the_layer()?;
    let transposed = LoraConfig { fan_in_fan_out: true, ..cfg() };
    let merged = merge_into(&base(), &adapter(transposed)?)?;
    assert_eq!(bits(&merged["h.q.weight"])?, bits(&expected)?);
    Ok(())
}

#[test]
fn kinds_are_read_from_the_file() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapter.safetensors");
    for (config, expected) in by_the_layer()? {
        lora::save_state_dict(&tensors(), &config, &path)?;
        let read = lora::read_state_dict(&path, &CPU)?;
        let weights = LoraWeights::new(read.config.expect("a configuration"), read.tensors)?;
        let merged = merge_into(&base(), &weights)?;
        assert_eq!(bits(&merged["h.q.weight"])?, bits(&expected)?, "{:?}", config.layers);
    }
    Ok(())
}

#[test]
fn empty_module_declares_all_layers() -> lora::Result<()> {
    let (mut base, mut tensors) = (base(), tensors());
    for (last, dims) in [("weight", [4, 4]), ("lora_A", [2, 4]), ("lora_B", [4, 2])] {
        let own = if last == "weight" { &mut base } else { &mut tensors };
        own.insert(format!("wte.{last}"), tensor(7, &dims, DType::F32));
    }
    let linear = AdapterConfig::from(cfg()).with_layer("", LayerKind::Linear);
    let merged = merge_into(&base, &LoraWeights::new(&linear, tensors.clone())?)?;
    let [(_, expected), ..] = by_the_layer()?;
    assert_eq!(bits(&merged["h.q.weight"])?, bits(&expected)?);
    // A longer entry takes precedence.
    let mixed = linear.with_layer("wte", LayerKind::Embedding);
    let other = merge_into(&base, &LoraWeights::new(mixed, tensors)?)?;
    assert_eq!(bits(&other["h.q.weight"])?, bits(&expected)?);
    assert!(difference(&other["wte.weight"], &merged["wte.weight"])? > 0.1);
    Ok(())
}
