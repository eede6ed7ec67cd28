//! This crate's files: safetensors with the configuration in the header's metadata.

use super::config::AdapterConfig;
use super::foreign::{foreign_file, refuse_other_names};
use super::lora_weights::LoraWeights;
use super::metadata::{from_json, to_json};
use crate::files::{atomic_file, read_shards, serialize, Metadata};
use crate::{Error, Result};
use candle_core::{DType, Device};
use std::path::Path;

/// The key of the configuration in a file's metadata.
const CONFIG: &str = "loralib";

/// Writes an adapter's file.
pub(crate) fn save(path: &Path, weights: &LoraWeights) -> Result<()> {
    let save = || {
        weights.options.lora.validate(DType::F32)?;
        let json = to_json(&weights.config())?;
        let bytes = serialize(&weights.state_dict(), Some((CONFIG, json)))?;
        Ok(atomic_file::replace(path, &bytes)?)
    };
    save().map_err(|e: Error| e.at(path))
}

/// Reads an adapter's file.
pub(crate) fn load(path: &Path, device: &Device) -> Result<LoraWeights> {
    let (tensors, metadata) = read_shards(path, device)?;
    let load = || {
        refuse_other_names(tensors.keys())?;
        let config = parsed_config(&metadata)?.ok_or_else(|| {
            let reason = "it has no configuration of this crate: of PEFT's format load the folder; read files of \
                          other programs by `formats`, and torch's by `read_state_dict` and `LoraWeights::new`";
            foreign_file(tensors.keys()).map_or(Error::Invalid(reason.to_owned()), |(name, reason)| Error::tensor(name, reason))
        })?;
        LoraWeights::new(config, tensors)
    };
    load().map_err(|e: Error| e.at(path))
}

/// The configuration in a file's metadata; `None` in a file that another program wrote.
pub(crate) fn parsed_config(metadata: &Metadata) -> Result<Option<AdapterConfig>> {
    metadata.get(CONFIG).map(|text| from_json(text)).transpose()
}
