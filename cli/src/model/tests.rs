//! The decoder against transformers: small models of each family, written by `cli/tests/models/models.py`.

use super::base::Base;
use super::config::Config;
use super::decoder::Decoder;
use crate::train::{mean_loss, Example};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use std::fs;
use std::path::PathBuf;

const FAMILIES: [&str; 10] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "phi4_mini",
];

fn folder(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/models", name].iter().collect()
}

fn model(name: &str, config: &str) -> Result<Decoder> {
    let config = serde_json::from_str(&fs::read_to_string(folder(name).join(config))?)?;
    let weights = folder(name).join("model.safetensors");
    let vb = loralib::safetensors_var_builder(weights, DType::F32, &Device::Cpu)?;
    Ok(Decoder::new(&Config::from_json(config)?, vb)?)
}

/// The ids (1, tokens) of the text, and the logits (tokens, vocabulary) of its first tokens.
fn expected(name: &str, tokens: usize) -> Result<(Tensor, Tensor)> {
    let all =
        candle_core::safetensors::load(folder(name).join("logits.safetensors"), &Device::Cpu)?;
    let ids = all["ids"].narrow(0, 0, tokens)?.to_dtype(DType::U32)?.unsqueeze(0)?;
    Ok((ids, all[&format!("logits.{tokens}")].clone()))
}

fn packed(model: &Decoder, ids: &Tensor, lens: &[usize]) -> Result<Tensor> {
    let hidden = model.packed(ids, lens, |_, x, layer| layer(x))?;
    Ok(model.logits(&hidden)?.squeeze(0)?)
}

/// The largest difference, relative to the largest value.
fn apart(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    let largest = |t: &Tensor| t.abs()?.max_all()?.to_scalar::<f32>();
    Ok(largest(&(a - b)?)? / largest(b)?)
}

#[test]
fn logits_are_those_of_transformers() -> Result<()> {
    for name in FAMILIES {
        let model = model(name, "config.json")?;
        for tokens in [10, 40] {
            let (ids, logits) = expected(name, tokens)?;
            let apart = apart(&packed(&model, &ids, &[tokens])?, &logits)?;
            assert!(apart < 1e-5, "{name}, {tokens} tokens: {apart}");
        }
    }
    Ok(())
}

/// The loss has the logits' cap, too.
#[test]
fn the_loss_is_that_of_the_logits_of_transformers() -> Result<()> {
    for name in ["llama", "gemma2"] {
        let ((ids, logits), model) = (expected(name, 40)?, model(name, "config.json")?);
        let example = Example { ids: ids.squeeze(0)?.to_vec1()?, learned: vec![true; 40] };
        let loss = mean_loss(&model, &[example], (1, 64), &Device::Cpu)?;
        let labels = ids.squeeze(0)?.narrow(0, 1, 39)?;
        let expected = candle_nn::loss::cross_entropy(&logits.narrow(0, 0, 39)?, &labels)?;
        let expected = f64::from(expected.to_scalar::<f32>()?);
        assert!((loss - expected).abs() < 1e-5 * expected, "{name}: {loss}, {expected}");
    }
    Ok(())
}

#[test]
fn the_options_older_names_mean_the_same() -> Result<()> {
    for name in ["llama", "gemma3", "phi4_mini"] {
        let (ids, logits) = expected(name, 40)?;
        let apart = apart(&packed(&model(name, "config.older.json")?, &ids, &[40])?, &logits)?;
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    Ok(())
}

#[test]
fn texts_in_one_row_do_not_see_each_other() -> Result<()> {
    for name in FAMILIES {
        let model = model(name, "config.json")?;
        let ((long, logits), (short, few)) = (expected(name, 40)?, expected(name, 10)?);
        let ids = Tensor::cat(&[&short, &long, &short], 1)?;
        let apart =
            apart(&packed(&model, &ids, &[10, 40, 10])?, &Tensor::cat(&[&few, &logits, &few], 0)?)?;
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    Ok(())
}

/// Phi-3's rotations are others in a text that is still short.
#[test]
fn a_text_that_grows_has_the_logits_of_the_whole() -> Result<()> {
    for name in FAMILIES {
        let model = model(name, "config.json")?;
        let tokens = if name.starts_with("phi") { 10 } else { 40 };
        let (ids, logits) = expected(name, tokens)?;
        let (mut cache, mut rows) = (model.cache(4), vec![]);
        for (from, len) in [(0, 5), (5, 1), (6, tokens - 6)] {
            let hidden = model.continued(&ids.narrow(1, from, len)?, &mut cache)?;
            rows.push(model.logits(&hidden)?.squeeze(0)?);
        }
        let apart = apart(&Tensor::cat(&rows, 0)?, &logits)?;
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    Ok(())
}

/// The model and the logits that `tests/interop/logits.py` wrote.
#[test]
#[ignore = "reads a real model, by LORA_MODEL and LORA_LOGITS"]
fn logits_of_a_real_model_are_those_of_transformers() -> Result<()> {
    let path = |name| std::env::var_os(name).ok_or_else(|| format!("{name} is not set"));
    let base = Base::read(path("LORA_MODEL")?.as_ref(), &Device::Cpu)?;
    let model = base.model(base.var_builder()?)?;
    let all = candle_core::safetensors::load(path("LORA_LOGITS")?, &Device::Cpu)?;
    let ids = all["ids"].to_dtype(DType::U32)?.unsqueeze(0)?;
    for (name, expected) in &all {
        let Some(tokens) = name.strip_prefix("logits.") else { continue };
        let (tokens, kept) = (tokens.parse()?, expected.dim(0)?);
        let hidden = model.packed(&ids.narrow(1, 0, tokens)?, &[tokens], |_, x, layer| layer(x))?;
        let logits = model.logits(&hidden.narrow(1, tokens - kept, kept)?)?.squeeze(0)?;
        let apart = apart(&logits, expected)?;
        println!("{tokens} tokens: {apart:.1e}");
        assert!(apart < 1e-5, "{tokens} tokens: {apart}");
    }
    Ok(())
}
