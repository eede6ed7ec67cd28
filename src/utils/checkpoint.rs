//! Checkpoints on disk: safetensors files with the adapter's tensors and its configuration.

use super::config_json::{from_json, to_json};
use super::file;
use super::state_dict::{check_finite, elements, load_state_dict, LoadReport, StateDict, Strict};
use super::torch_file;
use super::trainable::{is_lora, split};
use crate::{Error, LoraConfig, Result};
use candle_core::safetensors::Load;
use candle_core::{DType, Device};
use candle_nn::VarMap;
use safetensors::tensor::SafeTensors;
use std::collections::BTreeMap;
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

/// A safetensors file's bytes, with `format: pt` and the given entry as metadata.
pub(crate) fn serialize(tensors: &StateDict, metadata: Option<(&str, String)>) -> Result<Vec<u8>> {
    if tensors.is_empty() {
        return Err(Error::Empty { wanted: "an empty state dict".to_owned(), held: 0 });
    }
    let mut cpu = StateDict::new();
    for (name, tensor) in tensors {
        if name == "__metadata__" {
            return Err(Error::tensor(name, "safetensors has this name for the metadata"));
        }
        check_finite(name, tensor)?;
        cpu.insert(name.clone(), tensor.to_device(&Device::Cpu)?);
    }
    let format = ("format", "pt".to_owned());
    let metadata: BTreeMap<_, _> = [Some(format), metadata].into_iter().flatten().collect();
    with_metadata(safetensors::serialize(&cpu, None).map_err(malformed)?, &metadata)
}

/// Puts metadata at the head of a file that has none. safetensors itself writes several entries in
/// a random order, and so other bytes at each save.
fn with_metadata(file: Vec<u8>, metadata: &BTreeMap<&str, String>) -> Result<Vec<u8>> {
    let file = file.split_first_chunk::<8>().and_then(|(len, rest)| {
        let (header, data) = rest.split_at_checked(u64::from_le_bytes(*len).try_into().ok()?)?;
        Some((header.trim_ascii_end().strip_prefix(b"{")?, data))
    });
    let Some((tensors, data)) = file else { return Err(malformed("a header without a start")) };
    let metadata = serde_json::to_string(metadata).map_err(malformed)?;
    let mut header = format!("{{\"__metadata__\":{metadata},").into_bytes();
    header.extend_from_slice(tensors);
    // The data is aligned to 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header, data].concat())
}

fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "safetensors", reason: reason.to_string() }
}

/// Reads a safetensors file, ours or another's, or a state dict that `torch.save` wrote (`.pt`,
/// `.pth`, `.bin`). The content tells which it is, not the name; nothing in the file is run.
///
/// # Errors
/// When the file cannot be read, is not well-formed, or holds an entry that is no tensor, one that
/// candle cannot represent, or a value that is not finite. The error names the file and the entry.
pub fn read_state_dict(path: impl AsRef<Path>, device: &Device) -> Result<Checkpoint> {
    let path = path.as_ref();
    let read = || {
        // Read, not mapped: a mapped file that another process truncates ends this one.
        parse(&fs::read(path)?, device)
    };
    read().map_err(|e: Error| e.at(path))
}

fn parse(bytes: &[u8], device: &Device) -> Result<Checkpoint> {
    if torch_file::is_torch(bytes) {
        return Ok(Checkpoint { tensors: torch_file::parse(bytes, device)?, config: None });
    }
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
    let config = header.metadata().as_ref().and_then(|metadata| metadata.get(CONFIG));
    let config = config.map(|text| from_json(text)).transpose()?;
    let mut tensors = StateDict::new();
    for (name, view) in SafeTensors::deserialize(bytes).map_err(malformed)?.iter() {
        if elements(view.shape()).is_none() {
            return Err(Error::tensor(name, format!("its shape is {:?}", view.shape())));
        }
        let tensor = view.load(device).map_err(|e| Error::tensor(name, e))?;
        check_finite(name, &tensor)?;
        tensors.insert(name.to_owned(), tensor);
    }
    Ok(Checkpoint { tensors, config })
}

/// Reads a checkpoint into the variables of `vars`, all of it or, on an error, nothing. A model that
/// is merged runs on as it was until `eval()` is called again. Adapters in PEFT's format are read by
/// [`peft::load_pretrained`](crate::peft::load_pretrained).
///
/// # Errors
/// As [`read_state_dict`] and [`load_state_dict`]; and when the file carries a configuration whose
/// scaling (`r`, `lora_alpha`, `rslora`) is not that of `cfg`.
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
    let is_factor = |name: &String| is_lora(split(name).1);
    if cfg.r > 0 && !tensors.is_empty() && !tensors.keys().any(is_factor) {
        let wanted = "lora_A or lora_B, which r > 0 stands for".to_owned();
        return Err(Error::Empty { wanted, held: tensors.len() });
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
