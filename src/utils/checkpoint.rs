//! Checkpoint files: an adapter's tensors with its configuration in the header.

use super::state_dict::{load_state_dict, LoadReport, Strict};
use super::trainable::variables;
use crate::files::{read_shards, StateDict};
use crate::layers::{LoraConfig, Part};
use crate::weights::{parsed_config, save, AdapterConfig, LoraWeights};
use crate::{Error, Result};
use candle_core::{Device, Var};
use candle_nn::VarMap;
use std::collections::BTreeMap;
use std::path::Path;

/// The files of a folder in PEFT's format.
const PEFT_FILES: [&str; 3] =
    ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"];

/// The contents of a checkpoint. [`LoraWeights::new`] makes an adapter of them.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The tensors by name.
    pub tensors: StateDict,
    /// The configuration that the adapter was saved with; `None` in files that other programs wrote.
    pub config: Option<AdapterConfig>,
}

/// Writes a safetensors file with the tensors and, in its metadata, the configuration.
///
/// `config` is a [`LoraConfig`], or an [`AdapterConfig`] with the kinds of layers and the ranks and alphas
/// that differ: then [`merge_into`](crate::merge::merge_into) and [`load_checkpoint`] know them from the file. What
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
    let path = path.as_ref();
    save(path, &LoraWeights::new(config, tensors.clone()).map_err(|e| e.at(path))?)
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
    let path = path.as_ref();
    let (tensors, metadata) = match read_shards(path, device) {
        Err(_) if PEFT_FILES.iter().any(|file| path.join(file).exists()) => {
            let reason = "it is a folder in PEFT's format: read it by `Adapter::load` or `formats::peft::load`";
            return Err(Error::Invalid(reason.to_owned()).at(path));
        }
        read => read?,
    };
    let config = parsed_config(&metadata).map_err(|e| e.at(path))?;
    Ok(Checkpoint { tensors, config })
}

/// Reads a checkpoint into the variables of `vars`: all of it or, on an error, nothing. In evaluation
/// the new values count from the next `eval()` on. For other formats there is [`load_weights`].
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
    let Checkpoint { tensors, config: saved } = read_state_dict(path, &Device::Cpu)?;
    let load = || {
        let held = variables(vars);
        let has_kernels = held.keys().any(|name| is_kernel(&held, Part::parse(name).0));
        // What a model trains as kernels has matrices in a file, which tells their kind.
        let in_form = |weights: LoraWeights| weights.with_kernels(|path, _| is_kernel(&held, path));
        let of_file = match saved {
            Some(saved) => {
                let weights = in_form(LoraWeights::new(saved, tensors.clone())?)?;
                check_same(&weights, &config)?;
                weights
            }
            None => in_form(LoraWeights::parse(config.clone(), &tensors)?)?,
        };
        if has_kernels {
            return load_state_dict(vars, &of_file.state_dict(), strict);
        }
        LoraWeights::parse(config, &tensors)?;
        load_state_dict(vars, &tensors, strict)
    };
    load().map_err(|e: Error| e.at(path))
}

/// Reads an adapter of any [format](crate::formats) into the variables of `vars`: all of it or, on an error, nothing.
/// The model was built with `config`: a [`LoraConfig`], or an [`AdapterConfig`] with the layers that differ. In
/// evaluation the new values count from the next `eval()` on.
///
/// PEFT also saves the table under an adapted embedding, which equals the base's. Without a variable for it the
/// report lists it as unexpected, also with [`Strict::Yes`].
///
/// # Errors
/// As [`load_state_dict`]; and if a layer's rank, scaling or use_dora differs from `config`'s.
pub fn load_weights(
    weights: &LoraWeights,
    vars: &VarMap,
    config: impl Into<AdapterConfig>,
    strict: Strict,
) -> Result<LoadReport> {
    let held = variables(vars);
    let weights = weights.clone().with_kernels(|path, _| is_kernel(&held, path))?;
    weights.check_same_options(&config.into())?;
    let (mut tensors, mut tables) = (weights.state_dict(), vec![]);
    tensors.retain(|name, _| {
        let table = weights.is_adapted_weight(name) && !held.contains_key(name);
        tables.extend(table.then(|| name.clone()));
        !table
    });
    let mut report = load_state_dict(vars, &tensors, strict)?;
    report.unexpected.extend(tables);
    Ok(report)
}

/// Whether the factors of the layer at `path` are a convolution's kernels.
fn is_kernel(vars: &BTreeMap<String, Var>, path: &str) -> bool {
    vars.get(&Part::A.at(path)).is_some_and(|var| var.rank() > 2)
}

/// An error if the rank, scaling or kind of a layer differs.
fn check_same(saved: &LoraWeights, model: &AdapterConfig) -> Result<()> {
    let common = saved.options.lora;
    for (path, layer) in saved.layers() {
        compare(Some(path), &layer.options(&common), &model.lora_config(path))?;
        if let (Some(saved), Some(model)) = (&layer.kind, model.kind(path)) {
            same(Some(path), "kind", format!("{saved:?}"), format!("{model:?}"))?;
        }
    }
    match saved.layers.is_empty() {
        true => compare(None, &common, &model.lora),
        false => Ok(()),
    }
}

fn compare(path: Option<&str>, saved: &LoraConfig, model: &LoraConfig) -> Result<()> {
    same(path, "r", saved.r, model.r)?;
    same(path, "lora_alpha", saved.lora_alpha, model.lora_alpha)?;
    same(path, "rslora", saved.rslora, model.rslora)?;
    same(path, "use_dora", saved.use_dora, model.use_dora)
}

fn same<T: PartialEq + ToString>(
    layer: Option<&str>,
    option: &'static str,
    saved: T,
    model: T,
) -> Result<()> {
    if saved == model {
        return Ok(());
    }
    let (saved, model) = (saved.to_string(), model.to_string());
    Err(Error::Config { layer: layer.map(str::to_owned), option, saved, model })
}
