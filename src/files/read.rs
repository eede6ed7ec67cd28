//! Whole files in memory, of either format.

use super::safetensors::{self, Metadata};
use super::shards::Shards;
use super::state_dict::StateDict;
use super::torch;
use crate::{Error, Result};
use candle_core::Device;
use std::fs;
use std::path::Path;

/// The tensors and the metadata of one file in either format; torch's has none.
pub(crate) fn read(path: &Path, device: &Device) -> Result<(StateDict, Metadata)> {
    let bytes = fs::read(path)?;
    refuse_other_kinds(&bytes)?;
    if torch::is_torch(&bytes) {
        Ok((torch::parse(&bytes, None, device)?, Metadata::new()))
    } else {
        safetensors::parse(&bytes, device)
    }
}

/// The tensors and the metadata of a file, or of all shards of an index or a folder. Errors name the file.
pub(crate) fn read_shards(path: &Path, device: &Device) -> Result<(StateDict, Metadata)> {
    let (mut tensors, mut metadata) = (StateDict::new(), Metadata::new());
    let shards = Shards::find(path)?;
    for shard in shards.paths() {
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
    shards.check(|name| tensors.contains_key(name))?;
    Ok((tensors, metadata))
}

/// An error for the start of a file of another kind, whose first bytes are no length of a header.
pub(crate) fn refuse_other_kinds(start: &[u8]) -> Result<()> {
    // The length of a header is less than 2⁴⁰: its last bytes are 0.
    let is_text = start.len() >= 8 && start[..8].iter().all(|byte| *byte != 0);
    let reason = match without_byte_order_mark(start).trim_ascii_start() {
        [b'G', b'G', b'U', b'F', ..] => {
            "it is a GGUF file: open it by `gguf::File`, or read an adapter by `Adapter::load_gguf`"
        }
        [b'{', ..] if is_text => {
            "it is a JSON file: give the folder that it is in, or the file of the tensors"
        }
        _ => return Ok(()),
    };
    Err(Error::Invalid(reason.to_owned()))
}

/// The text of a JSON file. Some editors put a byte order mark before it.
pub(crate) fn without_byte_order_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}
