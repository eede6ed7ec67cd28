//! The trained and saved names against loralib's.

use super::case::{golden, strings, Tensors};
use super::{names, var_map};
use crate::common::device;
use candle_core::{DType, Result, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use lora::{Bias, LoraConfig};
use loralib as lora;
use serde_json::Value;
use std::collections::BTreeSet;

/// The layers of `Model` in golden.py.
fn model(vb: VarBuilder) -> Result<()> {
    let cfg = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    candle_nn::embedding(4, 2, vb.pp("attention_bias"))?;
    lora::conv2d(2, 4, 3, Conv2dConfig::default(), cfg, vb.pp("conv"))?;
    lora::embedding(7, 3, cfg, vb.pp("embedding"))?;
    candle_nn::linear(4, 2, vb.pp("head"))?;
    lora::linear(5, 4, cfg, vb.pp("linear"))?;
    lora::merged_linear(4, 6, &[true, false, true], cfg, vb.pp("merged"))?;
    lora::linear_no_bias(5, 4, cfg, vb.pp("proj"))?;
    lora::linear(5, 4, LoraConfig::default(), vb.pp("r0"))?;
    Ok(())
}

/// The selected names of `vars`, which must be the same for training and saving.
fn selected(vars: &VarMap, bias: Bias) -> Result<BTreeSet<String>> {
    let saved: BTreeSet<_> = lora::lora_state_dict(vars, bias)?.into_keys().collect();
    let marked = lora::mark_only_lora_as_trainable(vars, bias)?;
    let marked: Vec<_> = marked.iter().map(|var| var.id()).collect();
    let data = vars.data().lock().unwrap();
    let trained = data.iter().filter(|(_, var)| marked.contains(&var.id()));
    assert_eq!(saved, trained.map(|(name, _)| name.clone()).collect());
    Ok(saved)
}

/// loralib's names with the deliberate differences of this crate.
fn expected(golden: &Value, word: &str, of: &str) -> BTreeSet<String> {
    let mut names = strings(&golden["model"][word][of]);
    let (only_theirs, only_ours): (&[&str], &[&str]) = match (word, of) {
        // loralib searches the whole name for "bias": it would train and save an embedding.
        ("all", _) => (&["attention_bias.weight"], &[]),
        // A convolution's bias is `conv.bias` below the layer; loralib looks for `bias`, and does not
        // find it.
        ("lora_only", "saved") => (&[], &["conv.conv.bias"]),
        // It also trains the bias of a layer without an adapter, but does not save it.
        ("lora_only", _) => (&["r0.bias"], &["conv.conv.bias"]),
        _ => (&[], &[]),
    };
    // A difference that does not exist is an error.
    assert!(only_theirs.iter().all(|name| names.remove(*name)), "{word}, {of}");
    assert!(only_ours.iter().all(|name| names.insert(name.to_string())), "{word}, {of}");
    names
}

#[test]
fn trained_and_saved_names_agree_with_loralib() -> Result<()> {
    let golden = golden("golden");
    let mut state = Tensors::new();
    for (name, shape) in golden["model"]["state"].as_object().unwrap() {
        let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
        state.insert(name.clone(), Tensor::zeros(shape, DType::F32, &device())?);
    }
    let all: BTreeSet<_> = state.keys().cloned().collect();
    for word in ["none", "all", "lora_only"] {
        let bias: Bias = word.parse()?;
        let names_of = |of| expected(&golden, word, of);
        assert_eq!(names_of("trained"), names_of("saved"));

        let base = state.clone().into_iter().filter(|(name, _)| !name.contains(".lora_"));
        let base = VarBuilder::from_tensors(base.collect(), DType::F32, &device());
        let adapter = VarMap::new();
        model(lora::var_builder(base, &adapter, bias))?;
        assert_eq!(names(&adapter), names_of("saved"), "{word}, frozen base and adapter");
        assert_eq!(selected(&adapter, bias)?, names_of("saved"), "{word}, frozen base and adapter");

        let vars = var_map(state.clone())?;
        model(VarBuilder::from_varmap(&vars, DType::F32, &device()))?;
        assert_eq!(names(&vars), all, "{word}, one VarMap");
        assert_eq!(selected(&vars, bias)?, names_of("saved"), "{word}, one VarMap");

        // A new model has a convolution's weight and bias under the same names as other layers.
        let vars = VarMap::new();
        model(VarBuilder::from_varmap(&vars, DType::F32, &device()))?;
        let plain = |names: &BTreeSet<String>| -> BTreeSet<String> {
            names.iter().map(|name| name.replace("conv.conv.", "conv.")).collect()
        };
        assert_eq!(names(&vars), plain(&all), "{word}, a new VarMap");
        assert_eq!(selected(&vars, bias)?, plain(&names_of("saved")), "{word}, a new VarMap");
    }
    Ok(())
}
