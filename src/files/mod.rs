//! Checkpoint files: their tensors and metadata, read and written whole or one tensor at a time.
//!
//! Nothing here knows of adapters. A reader detects the format from the content, executes nothing in a file, and maps
//! none: truncating a mapped file kills the process. A writer replaces a file atomically.

pub(crate) mod atomic_file;
pub(crate) mod folder;
mod safetensors;
pub(crate) mod safetensors_file;
pub(crate) mod shards;
mod torch;
mod wrappers;

use self::shards::Shards;
use crate::ops::is_finite;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

pub(crate) use self::safetensors::{header, serialize, Metadata};
pub(crate) use torch::is_torch;
pub use torch::read_torch_entry;
pub(crate) use wrappers::refuse_wrapped_names;
pub use wrappers::strip_wrappers;

/// Tensors by name.
pub type StateDict = BTreeMap<String, Tensor>;

/// The tensors and the metadata of one file in either format; torch's has none.
pub(crate) fn read(path: &Path, device: &Device) -> Result<(StateDict, Metadata)> {
    let bytes = fs::read(path)?;
    if is_torch(&bytes) {
        Ok((torch::parse(&bytes, None, device)?, Metadata::new()))
    } else {
        self::safetensors::parse(&bytes, device)
    }
}

/// The tensors and the metadata of a file, or of all shards of an index or a folder. Errors name the file.
pub(crate) fn read_shards(path: &Path, device: &Device) -> Result<(StateDict, Metadata)> {
    let (mut tensors, mut metadata) = (StateDict::new(), Metadata::new());
    for shard in Shards::find(path)?.paths() {
        let mut load = || {
            let (shard, own) = read(&shard, device)?;
            metadata.extend(own);
            for (name, tensor) in shard {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(Error::tensor(name, "another shard has it too"));
                }
            }
            Ok(())
        };
        load().map_err(|e: Error| e.at(&shard))?;
    }
    Ok((tensors, metadata))
}

/// The text of a JSON file. Some editors put a byte order mark before it.
pub(crate) fn without_byte_order_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

/// An error if a value of a float tensor is not finite.
pub(crate) fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    let finite = is_finite(tensor).map_err(|e| Error::tensor(name, e));
    if !tensor.dtype().is_float() || finite? {
        Ok(())
    } else {
        Err(Error::tensor(name, "it has values that are not finite"))
    }
}
