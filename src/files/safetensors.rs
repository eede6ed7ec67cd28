//! safetensors files in memory.

use super::state_dict::{check_finite, StateDict};
use crate::ops::checked_elem_count;
use crate::{Error, Result};
use ::safetensors::tensor::{Dtype, Metadata as HeaderMetadata, SafeTensors, TensorInfo};
use candle_core::safetensors::Load;
use candle_core::Device;
use std::collections::{BTreeMap, HashMap};

/// The metadata in a file's header.
pub(crate) type Metadata = HashMap<String, String>;

/// A safetensors file with `format: pt` and the given entry as metadata.
pub(crate) fn serialize(tensors: &StateDict, metadata: Option<(&str, String)>) -> Result<Vec<u8>> {
    if tensors.is_empty() {
        return Err(Error::Invalid("the state dict is empty: there is nothing to save".to_owned()));
    }
    let mut cpu = StateDict::new();
    for (name, tensor) in tensors {
        if name == "__metadata__" {
            return Err(Error::tensor(name, "safetensors reserves this name for the metadata"));
        }
        check_finite(name, tensor)?;
        cpu.insert(name.clone(), tensor.to_device(&Device::Cpu)?);
    }
    let format = ("format", "pt".to_owned());
    let metadata: BTreeMap<_, _> = [Some(format), metadata].into_iter().flatten().collect();
    with_metadata(::safetensors::serialize(&cpu, None).map_err(malformed)?, &metadata)
}

/// Adds metadata to a file that has none. safetensors itself writes several entries in random order,
/// which changes the bytes from save to save.
fn with_metadata(file: Vec<u8>, metadata: &BTreeMap<&str, String>) -> Result<Vec<u8>> {
    let file = file.split_first_chunk::<8>().and_then(|(len, rest)| {
        let (header, data) = rest.split_at_checked(u64::from_le_bytes(*len).try_into().ok()?)?;
        Some((header.trim_ascii_end().strip_prefix(b"{")?, data))
    });
    let Some((tensors, data)) = file else {
        return Err(malformed("its header is not a JSON object"));
    };
    let metadata = serde_json::to_string(metadata).map_err(malformed)?;
    let mut header = format!("{{\"__metadata__\":{metadata},").into_bytes();
    header.extend_from_slice(tensors);
    // The data is aligned to 8 bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header, data].concat())
}

/// The start of a file with `format: pt` as metadata, before the tensors' data in this order.
pub(crate) fn header(tensors: Vec<(String, TensorInfo)>) -> Result<Vec<u8>> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    start(&HeaderMetadata::new(Some(metadata), tensors).map_err(malformed)?)
}

/// The header with its length.
pub(super) fn start(header: &HeaderMetadata) -> Result<Vec<u8>> {
    let mut header = serde_json::to_vec(header).map_err(malformed)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header].concat())
}

pub(crate) fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "safetensors", reason: reason.to_string() }
}

pub(super) fn parse(bytes: &[u8], device: &Device) -> Result<(StateDict, Metadata)> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
    let mut tensors = StateDict::new();
    for (name, view) in SafeTensors::deserialize(bytes).map_err(malformed)?.iter() {
        if checked_elem_count(view.shape()).is_none() {
            return Err(Error::tensor(name, format!("its shape is {:?}", view.shape())));
        }
        if view.dtype() == Dtype::BOOL {
            let reason = "its dtype is BOOL, as of on_input in (IA)\u{b3}, which is not LoRA";
            return Err(Error::tensor(name, reason));
        }
        let tensor = view.load(device).map_err(|e| Error::tensor(name, e))?;
        check_finite(name, &tensor)?;
        tensors.insert(name.to_owned(), tensor);
    }
    Ok((tensors, header.metadata().clone().unwrap_or_default()))
}
