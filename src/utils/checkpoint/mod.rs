//! Checkpoint files: an adapter's tensors with its configuration in the header.

pub(crate) mod atomic_file;
pub(crate) mod folder;
mod metadata;
pub(crate) mod safetensors;
pub(crate) mod safetensors_file;
pub(crate) mod shards;
pub(crate) mod torch;

use self::metadata::{from_json, to_json};
use self::safetensors::{serialize, Metadata};
use self::shards::Shards;
use super::adapter_config::AdapterConfig;
use super::factors::check_magnitudes;
use super::names::{is_lora, refuse_other_names, split};
use super::state_dict::{load_state_dict, LoadReport, StateDict, Strict};
use crate::layers::{LayerKind, LoraConfig};
use crate::{Error, Result};
use candle_core::{DType, Device};
use candle_nn::VarMap;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The key of the configuration in a file's metadata.
const CONFIG: &str = "loralib";

/// The files of a folder in PEFT's format.
const PEFT_FILES: [&str; 3] =
    ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"];

/// The contents of a checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The tensors by name.
    pub tensors: StateDict,
    /// The options that the adapter was saved with; `None` in files that other programs wrote.
    /// [`read_adapter`] also returns those of single layers.
    pub config: Option<LoraConfig>,
}

/// Writes a safetensors file with the tensors and, in its metadata, the configuration.
///
/// `config` is a [`LoraConfig`], or an [`AdapterConfig`] with the kinds of layers and the ranks and alphas
/// that differ: then [`merge_into`](crate::merge_into) and [`load_checkpoint`] know them from the file. What
/// is of PEFT's format alone (`one_rank`, `base_model_name_or_path`, `task_type`) is not saved.
///
/// The file appears complete and flushed to disk, or not at all. Equal contents give equal bytes. It has
/// the permissions of the file that it replaces, or those of any new file. The state of an optimizer is
/// not saved.
///
/// # Errors
/// If there is nothing to save, a value is not finite, the configuration does not fit the tensors, or
/// the file system refuses. The error names the file.
pub fn save_state_dict(
    tensors: &StateDict,
    config: impl Into<AdapterConfig>,
    path: impl AsRef<Path>,
) -> Result<()> {
    let (path, config) = (path.as_ref(), config.into());
    let save = || {
        check_config(tensors, &config)?;
        config.check_used(layers(tensors).into_iter())?;
        let bytes = serialize(tensors, Some((CONFIG, to_json(&config)?)))?;
        Ok(atomic_file::replace(path, &bytes)?)
    };
    save().map_err(|e: Error| e.at(path))
}

/// Reads a safetensors file, a state dict that `torch.save` wrote (`.pt`, `.pth`, `.bin`), or all shards of
/// a model, by its index (`model.safetensors.index.json`) or its folder.
///
/// The format is detected from the content. Nothing in a file is executed.
///
/// # Errors
/// If a file cannot be read, is malformed, or has an entry that is not a tensor, that candle cannot
/// represent, or that is not finite. The error names the file and the entry.
pub fn read_state_dict(path: impl AsRef<Path>, device: &Device) -> Result<Checkpoint> {
    let (config, tensors) = read_adapter(path, device)?;
    Ok(Checkpoint { tensors, config: config.map(|config| config.lora) })
}

/// [`read_state_dict`] with the whole configuration: also the kinds, ranks and alphas of single layers.
/// `None` in files that other programs wrote.
///
/// # Errors
/// As [`read_state_dict`].
pub fn read_adapter(
    path: impl AsRef<Path>,
    device: &Device,
) -> Result<(Option<AdapterConfig>, StateDict)> {
    let path = path.as_ref();
    let shards = match Shards::find(path) {
        Err(_) if PEFT_FILES.iter().any(|file| path.join(file).exists()) => {
            let reason = "it is a folder in PEFT's format: read it with `peft::load_adapter` or \
                          `peft::load_pretrained`";
            return Err(Error::Invalid(reason.to_owned()).at(path));
        }
        found => found?,
    };
    let (mut config, mut tensors) = (None, StateDict::new());
    for shard in shards.paths() {
        let mut load = || {
            let (shard, metadata) = read(&shard, device)?;
            if let Some(text) = metadata.get(CONFIG) {
                config = Some(from_json(text)?);
            }
            for (name, tensor) in shard {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(Error::tensor(name, "another shard has it too"));
                }
            }
            Ok(())
        };
        load().map_err(|e: Error| e.at(&shard))?;
    }
    Ok((config, tensors))
}

/// Reads the state dict in one entry of a file that `torch.save` wrote, as training programs save it beside an
/// optimizer: `"state_dict"` of Lightning, `"model"`, or `"model_state_dict"`. [`read_state_dict`] lists the
/// entries of such a file in its error.
///
/// # Errors
/// As [`read_state_dict`], if the file is not torch's, and if it has no such entry.
pub fn read_torch_entry(path: impl AsRef<Path>, entry: &str, device: &Device) -> Result<StateDict> {
    let path = path.as_ref();
    let read = || match fs::read(path)? {
        bytes if torch::is_torch(&bytes) => torch::parse(&bytes, Some(entry), device),
        _ => Err(Error::Format { format: "torch", reason: "it is no zip archive".to_owned() }),
    };
    read().map_err(|e| e.at(path))
}

/// The tensors and the metadata of one file in either format; torch's has none.
pub(crate) fn read(path: &Path, device: &Device) -> Result<(StateDict, Metadata)> {
    // Read, not mapped: truncating a mapped file kills the process.
    let bytes = fs::read(path)?;
    if torch::is_torch(&bytes) {
        Ok((torch::parse(&bytes, None, device)?, Metadata::new()))
    } else {
        safetensors::parse(&bytes, device)
    }
}

/// Reads a checkpoint into the variables of `vars`: all of it or, on an error, nothing. In evaluation
/// the new values count from the next `eval()` on. For PEFT's format there is
/// [`peft::load_adapter`](crate::peft::load_adapter).
///
/// A file without a configuration, such as torch's, does not tell its `lora_alpha`: it is taken from
/// `config`.
///
/// # Errors
/// As [`read_state_dict`] and [`load_state_dict`]; if the file has a configuration in which a layer's
/// rank, scaling or kind differs from `config`'s; if the rank of a factor is not a multiple of its
/// layer's; and if the file has no factors but `config` has r > 0.
pub fn load_checkpoint(
    path: impl AsRef<Path>,
    vars: &VarMap,
    config: impl Into<AdapterConfig>,
    strict: Strict,
) -> Result<LoadReport> {
    let (path, config) = (path.as_ref(), config.into());
    let (saved, tensors) = read_adapter(path, &Device::Cpu)?;
    let load = || {
        if let Some(saved) = saved {
            check_same(&tensors, &saved, &config)?;
        }
        check_config(&tensors, &config)?;
        load_state_dict(vars, &tensors, strict)
    };
    load().map_err(|e: Error| e.at(path))
}

/// The paths of the adapted layers.
fn layers(tensors: &StateDict) -> BTreeSet<&str> {
    tensors.keys().filter(|name| is_lora(name)).map(|name| split(name).0).collect()
}

/// An error if a factor cannot have its layer's rank. That of a `MergedLinear`, a convolution or an
/// undeclared layer may be a multiple of it.
fn check_config(tensors: &StateDict, config: &AdapterConfig) -> Result<()> {
    config.lora.validate(DType::F32)?;
    refuse_other_names(tensors.keys())?;
    if config.lora.r > 0 && !tensors.is_empty() && layers(tensors).is_empty() {
        let names: Vec<_> = tensors.keys().take(3).collect();
        let reason = format!(
            "it has no lora_A or lora_B, but tensors such as {names:?}; to load a base use \
             `load_state_dict`"
        );
        return Err(Error::Format { format: "LoRA adapter", reason });
    }
    check_magnitudes(tensors, config)?;
    for (name, tensor) in tensors {
        let rank = match (split(name).1, tensor.dims()) {
            ("lora_A", &[rank, _]) | ("lora_B", &[_, rank]) => rank,
            _ => continue,
        };
        let cfg = config.lora_config(split(name).0);
        cfg.validate(DType::F32).map_err(|e| Error::tensor(name, e))?;
        let exact =
            matches!(config.kind(split(name).0), Some(LayerKind::Linear | LayerKind::Embedding));
        if rank.checked_rem(cfg.r) != Some(0) || (exact && rank != cfg.r) {
            let reason = format!("its rank is {rank}, the configuration has r = {}", cfg.r);
            return Err(Error::tensor(name, reason));
        }
    }
    Ok(())
}

/// An error if the rank, scaling or kind of a layer differs.
fn check_same(tensors: &StateDict, saved: &AdapterConfig, model: &AdapterConfig) -> Result<()> {
    let mut paths: Vec<_> = layers(tensors).into_iter().map(Some).collect();
    if paths.is_empty() {
        paths.push(None);
    }
    for path in paths {
        let cfg = |config: &AdapterConfig| path.map_or(config.lora, |p| config.lora_config(p));
        let (ours, theirs) = (cfg(model), cfg(saved));
        let same = |option, saved: String, model: String| {
            if saved == model {
                Ok(())
            } else {
                Err(Error::Config { layer: path.map(str::to_owned), option, saved, model })
            }
        };
        same("r", theirs.r.to_string(), ours.r.to_string())?;
        same("lora_alpha", theirs.lora_alpha.to_string(), ours.lora_alpha.to_string())?;
        same("rslora", theirs.rslora.to_string(), ours.rslora.to_string())?;
        same("use_dora", theirs.use_dora.to_string(), ours.use_dora.to_string())?;
        let kind = |config: &AdapterConfig| config.kind(path?).map(|kind| format!("{kind:?}"));
        if let (Some(saved), Some(model)) = (kind(saved), kind(model)) {
            same("kind", saved, model)?;
        }
    }
    Ok(())
}
