//! Errors state the actual cause, not that of another error.

use crate::common::CFG;
use crate::{adapter, CPU};
use candle_core::{DType, Tensor};
use lora::{peft, AdapterConfig, Bias, LoraConfig, StateDict, Strict};
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

/// A folder in PEFT's format.
fn peft_folder(parent: &Path) -> lora::Result<PathBuf> {
    let folder = parent.join("peft");
    peft::save_pretrained(&folder, &state()?, CFG)?;
    Ok(folder)
}

#[test]
fn folder_without_a_model() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let named = ["the folder has none of", "model.safetensors"];
    says(lora::read_state_dict(dir.path(), &CPU), &named);
    says(lora::read_adapter(dir.path(), &CPU), &named);
    let (_, vars) = adapter(Bias::None)?;
    says(lora::load_checkpoint(dir.path(), &vars, CFG, Strict::Yes), &named);
    let out = dir.path().join("out");
    says(lora::merge_files(dir.path(), &state()?, CFG, out, |_| {}), &named);
    Ok(())
}

#[test]
fn folder_in_pefts_format() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let folder = peft_folder(dir.path())?;
    let named = ["PEFT", "`peft::load_adapter`", "`peft::load_pretrained`"];
    says(lora::read_state_dict(&folder, &CPU), &named);
    says(lora::read_adapter(&folder, &CPU), &named);
    let (_, vars) = adapter(Bias::None)?;
    says(lora::load_checkpoint(&folder, &vars, CFG, Strict::Yes), &named);
    Ok(())
}

#[test]
fn empty_merges_and_sums() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let base = StateDict::from([("q.weight".into(), Tensor::zeros((4, 4), DType::F32, &CPU)?)]);
    says(lora::merge_into(&base, &StateDict::new(), CFG), &["adapter is empty"]);
    let from = dir.path().join("base.safetensors");
    candle_core::safetensors::save(&base.into_iter().collect(), &from)?;
    let out = dir.path().join("out.safetensors");
    says(lora::merge_files(&from, &StateDict::new(), CFG, out, |_| {}), &["adapter is empty"]);
    says(lora::add_weighted(&[]), &["no adapters to add"]);
    let empty = StateDict::new();
    says(lora::add_weighted(&[(&empty, 1.)]), &["no adapters to add"]);
    says(lora::save_state_dict(&empty, CFG, &from), &["state dict is empty"]);
    Ok(())
}

#[test]
fn sums_of_adapters_with_different_names() -> lora::Result<()> {
    let one = state()?;
    let other = one.iter().map(|(name, t)| (format!("model.{name}"), t.clone())).collect();
    let named = ["different names", "\"q.lora_A\"", "\"model.q.lora_A\""];
    says(lora::add_weighted(&[(&one, 1.), (&other, 1.)]), &named);
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
    let merge = |out: &Path| lora::merge_files(dir.path(), &state()?, &config, out, |_| {});
    says(merge(dir.path()), &["own folder", "merge into another one"]);
    says(merge(&dir.path().join(".")), &["own folder"]);
    merge(&dir.path().join("out"))
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
    says(peft::load_pretrained(&folder, &CPU), &named);
    let (_, vars) = adapter(Bias::None)?;
    says(peft::load_adapter(&folder, &vars, CFG, Strict::Yes), &named);
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
    says(peft::load_pretrained(&folder, &CPU), &named);
    fs::rename(folder.join("other.json"), folder.join("adapter_config.json"))?;
    fs::remove_file(&tensors)?;
    says(peft::load_pretrained(&folder, &CPU), &["adapter_model.safetensors", "No such file"]);
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
    says(lora::merge_into(&base, &state()?, CFG), &["\"q.weight\"", "the base does not have it"]);
    Ok(())
}
