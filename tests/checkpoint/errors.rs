//! Errors state the actual cause, not that of another error.

use crate::common::CFG;
use crate::{adapter, CPU};
use candle_core::{DType, Tensor};
use lora::adapter::AdapterConfig;
use lora::formats::peft;
use lora::merge::{add_weighted, merge_files, merge_into};
use lora::utils::StateDict;
use lora::{Bias, LoraConfig, LoraWeights, Strict};
use loralib as lora;
use std::fs;
use std::path::{Path, PathBuf};

/// Causes of other errors.
const FALSE: [&str; 4] = [
    "not a safetensors file",
    "nothing to train",
    "does not fit the model",
    "not a PEFT adapter file",
];

fn says<T>(result: lora::Result<T>, words: &[&str]) {
    let error = result.err().expect("an error").to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} does not contain {word:?}");
    }
    for word in FALSE {
        assert!(!error.contains(word), "{error:?} contains {word:?}");
    }
}

fn state() -> lora::Result<StateDict> {
    lora::lora_state_dict(&adapter(Bias::None)?.1, Bias::None)
}

fn weights() -> lora::Result<LoraWeights> {
    LoraWeights::new(CFG, state()?)
}

/// A folder in PEFT's format.
fn peft_folder(parent: &Path) -> lora::Result<PathBuf> {
    let folder = parent.join("peft");
    peft::save(&folder, &weights()?)?;
    Ok(folder)
}

#[test]
fn folder_without_a_model() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let named = ["the folder has none of", "model.safetensors"];
    says(lora::read_state_dict(dir.path(), &CPU), &named);
    let (_, vars) = adapter(Bias::None)?;
    says(lora::load_checkpoint(dir.path(), &vars, CFG, Strict::Yes), &named);
    let out = dir.path().join("out");
    says(merge_files(dir.path(), &weights()?, out, |_| {}), &named);
    Ok(())
}

#[test]
fn folder_in_pefts_format() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let folder = peft_folder(dir.path())?;
    let named = ["PEFT", "`Adapter::load`", "`formats::peft::load`"];
    says(lora::read_state_dict(&folder, &CPU), &named);
    let (_, vars) = adapter(Bias::None)?;
    says(lora::load_checkpoint(&folder, &vars, CFG, Strict::Yes), &named);
    Ok(())
}

#[test]
fn empty_merges_and_sums() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let (empty, path) = (StateDict::new(), dir.path().join("adapter.safetensors"));
    for config in [CFG, LoraConfig::default()] {
        says(LoraWeights::new(config, empty.clone()), &["adapter is empty"]);
    }
    says(add_weighted(&[]), &["no adapters to add"]);
    says(lora::save_state_dict(&empty, CFG, path), &["adapter is empty"]);
    Ok(())
}

#[test]
fn sums_of_adapters_with_different_layers() -> lora::Result<()> {
    let one = weights()?;
    let other = one.in_component("model");
    let named = ["none in common", "\"q\"", "\"model.q\""];
    says(add_weighted(&[(&one, 1.), (&other, 1.)]), &named);
    Ok(())
}

#[test]
fn merge_into_the_folder_of_the_base() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let base = [("q.weight", Tensor::zeros((4, 4), DType::F32, &CPU)?)];
    candle_core::safetensors::save(&base.into(), dir.path().join("1.safetensors"))?;
    let index = r#"{"weight_map": {"q.weight": "1.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index)?;
    let config = AdapterConfig::from(CFG).with_layer("", lora::layers::LayerKind::Linear);
    let weights = LoraWeights::new(config, state()?)?;
    let merge = |out: &Path| merge_files(dir.path(), &weights, out, |_| {});
    says(merge(dir.path()), &["own folder", "merge into another one"]);
    says(merge(&dir.path().join(".")), &["own folder"]);
    assert_eq!(merge(&dir.path().join("out"))?, Default::default());
    Ok(())
}

#[test]
fn dora_folder_without_magnitudes() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let folder = peft_folder(dir.path())?;
    let path = folder.join("adapter_config.json");
    let json = fs::read_to_string(&path)?;
    let dora = json.replace("\"use_dora\": false", "\"use_dora\": true");
    assert_ne!(json, dora);
    fs::write(&path, dora)?;
    let named = ["adapter_model.safetensors", "lora_magnitude_vector", "use_dora"];
    says(peft::load(&folder, &CPU), &named);
    says(lora::Adapter::load(&folder, &CPU), &named);
    Ok(())
}

#[test]
fn missing_files_of_a_peft_folder() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let folder = peft_folder(dir.path())?;
    let tensors = folder.join("adapter_model.safetensors");
    // As PEFT writes it: without the configuration in the tensors' file.
    let all = candle_core::safetensors::load(&tensors, &CPU)?;
    candle_core::safetensors::save(&all, &tensors)?;
    fs::rename(folder.join("adapter_config.json"), folder.join("other.json"))?;
    let named = ["adapter_config.json", "not found"];
    says(peft::load(&folder, &CPU), &named);
    fs::rename(folder.join("other.json"), folder.join("adapter_config.json"))?;
    fs::remove_file(&tensors)?;
    says(peft::load(&folder, &CPU), &["adapter_model.safetensors", "No such file"]);
    Ok(())
}

#[test]
fn adapters_of_another_model_or_rank() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapter.safetensors");
    lora::save_state_dict(&state()?, CFG, &path)?;
    let (_, vars) = adapter(Bias::None)?;
    let other = LoraConfig { r: 1, ..CFG };
    says(lora::load_checkpoint(&path, &vars, other, Strict::Yes), &["saved with r = 2", "has 1"]);
    let base = StateDict::from([("k.weight".into(), Tensor::zeros((4, 4), DType::F32, &CPU)?)]);
    says(merge_into(&base, &weights()?), &["\"q.weight\"", "the base does not have it"]);
    Ok(())
}
