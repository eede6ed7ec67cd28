//! Checkpoints on disk: safetensors files with the adapter's tensors and its configuration.

use super::config_json::{from_json, to_json};
use super::names::{is_lora, split};
use super::safetensors::{self, serialize, Metadata};
use super::state_dict::{load_state_dict, LoadReport, StateDict, Strict};
use super::{file, torch};
use crate::{peft, Error, LoraConfig, Result};
use candle_core::{DType, Device};
use candle_nn::VarMap;
use std::fs;
use std::path::Path;

/// The key of the configuration in a file's metadata.
const CONFIG: &str = "loralib";

/// What a checkpoint holds.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The tensors by name.
    pub tensors: StateDict,
    /// The configuration they were trained with; `None` in files that others wrote.
    pub config: Option<LoraConfig>,
}

/// Writes a safetensors file with the tensors and, in its metadata, the configuration.
///
/// It holds no optimizer's state, which candle's optimizers do not give out: a run that is resumed
/// from it starts AdamW's moments at zero. With an optimizer that has no state, as `SGD`, it goes on
/// bit for bit.
///
/// The file appears at once, complete and on the disk, or not at all; equal contents give equal
/// bytes. It has the mode of the file that it replaces, or that of any new file.
///
/// # Errors
/// When there is nothing to save, a value is not finite, `cfg` is not the configuration of these
/// tensors, or the file system refuses. The error names the file.
pub fn save_state_dict(
    tensors: &StateDict,
    cfg: &LoraConfig,
    path: impl AsRef<Path>,
) -> Result<()> {
    let path = path.as_ref();
    let save = || {
        check_config(tensors, cfg)?;
        let bytes = serialize(tensors, Some((CONFIG, to_json(cfg))))?;
        Ok(file::replace(path, &bytes)?)
    };
    save().map_err(|e: Error| e.at(path))
}

/// Reads a safetensors file, ours or another's, or a state dict that `torch.save` wrote (`.pt`,
/// `.pth`, `.bin`). The content tells which it is, not the name; nothing in the file is run.
///
/// # Errors
/// When the file cannot be read, is not well-formed, or holds an entry that is no tensor, one that
/// candle cannot represent, or a value that is not finite. The error names the file and the entry.
pub fn read_state_dict(path: impl AsRef<Path>, device: &Device) -> Result<Checkpoint> {
    let path = path.as_ref();
    let load = || {
        let (tensors, metadata) = read(path, device)?;
        let config = metadata.get(CONFIG).map(|text| from_json(text)).transpose()?;
        Ok(Checkpoint { tensors, config })
    };
    load().map_err(|e: Error| e.at(path))
}

/// The tensors and the metadata of a file in either format; torch's has none.
pub(crate) fn read(path: &Path, device: &Device) -> Result<(StateDict, Metadata)> {
    if path.is_dir() {
        let reason = "a folder; one in PEFT's format is for `peft::load_checkpoint` or \
                      `peft::load_pretrained`"
            .to_owned();
        return Err(Error::Format { format: "checkpoint", reason });
    }
    // Read, not mapped: a mapped file that another process truncates ends this one.
    let bytes = fs::read(path)?;
    match torch::is_torch(&bytes) {
        true => Ok((torch::parse(&bytes, device)?, Metadata::new())),
        false => safetensors::parse(&bytes, device),
    }
}

/// Reads a checkpoint into the variables of `vars`, all of it or, on an error, nothing, to serve it or
/// to train on; the step count and moments of an optimizer are not in it. A model that is merged runs
/// on as it was until `eval()` is called again. Adapters in PEFT's format are for
/// [`peft::load_checkpoint`].
///
/// A file without a configuration, as torch's, does not tell its `lora_alpha`: that is then `cfg`'s.
///
/// # Errors
/// As [`read_state_dict`] and [`load_state_dict`]; when the file carries a configuration whose scaling
/// (`r`, `lora_alpha`, `rslora`) is not that of `cfg`, when a factor's rank is no multiple of `cfg.r`,
/// and when it has no factors at all but `cfg.r > 0`.
pub fn load_checkpoint(
    path: impl AsRef<Path>,
    vars: &VarMap,
    cfg: &LoraConfig,
    strict: Strict,
) -> Result<LoadReport> {
    let path = path.as_ref();
    let Checkpoint { tensors, config } = read_state_dict(path, &Device::Cpu)?;
    let load = || {
        if let Some(saved) = config {
            same("r", saved.r, cfg.r)?;
            same("lora_alpha", saved.lora_alpha, cfg.lora_alpha)?;
            same("rslora", saved.rslora, cfg.rslora)?;
        }
        check_config(&tensors, cfg)?;
        load_state_dict(vars, &tensors, strict)
    };
    load().map_err(|e: Error| e.at(path))
}

/// An error if the factors cannot have the configuration's rank: that of a `MergedLinear` or a
/// convolution is a multiple of it.
fn check_config(tensors: &StateDict, cfg: &LoraConfig) -> Result<()> {
    cfg.validate(DType::F32)?;
    if cfg.r > 0 && !tensors.is_empty() && !tensors.keys().any(|name| is_lora(name)) {
        peft::refuse_names(tensors.keys())?;
        let names: Vec<_> = tensors.keys().take(3).collect();
        let reason = format!(
            "no lora_A or lora_B among its {} tensors, such as {names:?}; `load_state_dict` loads a base",
            tensors.len()
        );
        return Err(Error::Format { format: "LoRA adapter", reason });
    }
    for (name, tensor) in tensors {
        let rank = match (split(name).1, tensor.dims()) {
            ("lora_A", &[rank, _]) | ("lora_B", &[_, rank]) => rank,
            _ => continue,
        };
        if rank.checked_rem(cfg.r) != Some(0) {
            let reason = format!("its rank is {rank}, the configuration has r = {}", cfg.r);
            return Err(Error::tensor(name, reason));
        }
    }
    Ok(())
}

fn same<T: PartialEq + ToString>(option: &'static str, saved: T, model: T) -> Result<()> {
    match saved == model {
        true => Ok(()),
        false => Err(Error::Config { option, saved: saved.to_string(), model: model.to_string() }),
    }
}
