//! A merge from file to file, tensor by tensor: no more of the base is in memory than one weight.

use super::merge_plan::Plan;
use super::safetensors::malformed;
use super::shard::Shard;
use super::{file, serialize, Shards, StateDict};
use crate::peft::PeftConfig;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// How many bytes of the base have been merged or copied, and of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes so far.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Writes what [`merge_into`](crate::merge_into) gives, from file to file. `base` is a checkpoint, the
/// index of a sharded one (`model.safetensors.index.json`), or a folder with either; `out` is a file
/// for the first and another folder for the second, whose shards and index have the base's names. A
/// folder as `out` for a single file gets one of its name.
///
/// A safetensors base is merged tensor by tensor, and what is not adapted is copied byte for byte,
/// the header with its metadata too. Each file appears complete or not at all, an index last. A base
/// that `torch.save` wrote is read whole, and becomes safetensors.
///
/// # Errors
/// As [`merge_into`](crate::merge_into), before anything is written where a name is at fault; when
/// `out` is a sharded base's own folder, which a failure would leave half merged; and when a file is
/// malformed or the file system refuses. The error names the file and the tensor.
pub fn merge_files(
    base: impl AsRef<Path>,
    adapter: &StateDict,
    cfg: impl Into<PeftConfig>,
    out: impl AsRef<Path>,
    mut progress: impl FnMut(Progress),
) -> Result<()> {
    let (shards, out) = (Shards::find(base.as_ref())?, out.as_ref());
    let paths = shards.paths();
    if let (Shards::One(path), true) = (&shards, is_torch(&paths)?) {
        let tensors = super::merge_into(path.as_path(), adapter, cfg)?;
        let bytes = serialize(&tensors, None).map_err(|e| e.at(out))?;
        let target = match path.file_name() {
            Some(name) if out.is_dir() => out.join(name).with_extension("safetensors"),
            _ => out.to_owned(),
        };
        file::replace(&target, &bytes).map_err(|e| Error::from(e).at(&target))?;
        progress(Progress { done: bytes.len() as u64, total: bytes.len() as u64 });
        return Ok(());
    }
    let (mut names, mut total) = (BTreeSet::new(), 0);
    for path in &paths {
        let shard = Shard::open(path).map_err(|e| e.at(path))?;
        total += shard.data;
        for name in shard.header.offset_keys() {
            if !names.insert(name.clone()) {
                return Err(Error::tensor(name, "another shard has it too").at(path));
            }
        }
    }
    let plan = Plan::new(adapter, cfg.into(), |name| names.contains(name))?;
    let mut done = 0;
    let mut advance = |bytes| {
        done += bytes;
        progress(Progress { done, total });
    };
    let many = matches!(shards, Shards::Many { .. });
    if let Shards::Many { folder, .. } = &shards {
        let same = || {
            fs::create_dir_all(out)?;
            Ok(out.canonicalize()? == folder.canonicalize()?)
        };
        if same().map_err(|e: std::io::Error| Error::from(e).at(out))? {
            return Err(malformed("it is the base's own folder: merge into another").at(out));
        }
    }
    for path in &paths {
        let target = match path.file_name() {
            Some(name) if many || out.is_dir() => out.join(name),
            _ => out.to_owned(),
        };
        let mut shard = Shard::open(path).map_err(|e| e.at(path))?;
        file::replace_with(&target, |file| shard.merge(&plan, file, &mut advance))
            .map_err(|e: Error| e.at(path))?;
    }
    if let Shards::Many { folder, index, .. } = &shards {
        let (from, to) = (folder.join(index), out.join(index));
        let copy = || file::replace(&to, &fs::read(&from)?);
        copy().map_err(|e| Error::from(e).at(&to))?;
    }
    Ok(())
}

fn is_torch(paths: &[std::path::PathBuf]) -> Result<bool> {
    for path in paths {
        let mut start = vec![];
        let read = File::open(path).and_then(|file| file.take(8).read_to_end(&mut start));
        read.map_err(|e| Error::from(e).at(path))?;
        if super::torch::is_torch(&start) {
            if paths.len() > 1 {
                return Err(malformed("one shard of several, and not").at(path));
            }
            return Ok(true);
        }
    }
    Ok(false)
}
