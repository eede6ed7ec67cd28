//! A merge from file to file, tensor by tensor: no more of the base is in memory than one weight.

use super::merge_into::Plan;
use super::{elements, file, serialize, Shards, StateDict};
use crate::peft::PeftConfig;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, View};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// How many bytes of the base have been merged or copied, and of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes so far.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// [`merge_into`](crate::merge_into) from file to file. `base` is a checkpoint, the index of a
/// sharded one (`model.safetensors.index.json`), or a folder with either; `out` is a file for the
/// first and a folder for the second, whose shards and index have the base's names. A folder as `out`
/// for a single file gets one of its name.
///
/// A safetensors base is merged tensor by tensor, and what is not adapted is copied byte for byte,
/// the header with its metadata too. Each file appears complete or not at all, an index last. A base
/// that `torch.save` wrote is read whole, and becomes safetensors.
///
/// # Errors
/// As [`merge_into`](crate::merge_into), before anything is written where a name is at fault; and
/// when a file is malformed or the file system refuses. The error names the file and the tensor.
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
        let write = || Ok(file::replace(out, &serialize(&tensors, None)?)?);
        return write().map_err(|e: Error| e.at(out));
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
    if many {
        fs::create_dir_all(out).map_err(|e| Error::from(e).at(out))?;
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
        if super::torch_file::is_torch(&start) {
            if paths.len() > 1 {
                return Err(malformed("one shard of several, and not").at(path));
            }
            return Ok(true);
        }
    }
    Ok(false)
}

fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "safetensors", reason: reason.to_string() }
}

/// An open safetensors file.
struct Shard {
    file: File,
    /// The header as it stands in the file, with its length before it.
    start: Vec<u8>,
    header: Metadata,
    /// The length of the data behind the header.
    data: u64,
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut start = vec![0; 8];
        file.read_exact(&mut start).map_err(|_| malformed("no header"))?;
        let size = start.iter().rev().fold(0u64, |n, &b| (n << 8) | u64::from(b));
        let Some(data) = length.checked_sub(8).and_then(|rest| rest.checked_sub(size)) else {
            return Err(malformed(format!("a header of {size} bytes in a file of {length}")));
        };
        (&mut file).take(size).read_to_end(&mut start)?;
        let header: Metadata = start
            .get(8..)
            .and_then(|json| serde_json::from_slice(json).ok())
            .ok_or_else(|| malformed("its header is not that of a safetensors file"))?;
        let shard = Self { file, start, header, data };
        let mut end = 0;
        for name in shard.header.offset_keys() {
            let (from, to) = shard.range(&name)?;
            if from != end || to < from {
                return Err(Error::tensor(name, format!("it lies at {from}..{to}, not at {end}")));
            }
            end = to;
        }
        match end == data {
            true => Ok(shard),
            false => Err(malformed(format!("{data} bytes of data for tensors of {end}"))),
        }
    }

    fn range(&self, name: &str) -> Result<(u64, u64)> {
        let info = self.header.info(name).ok_or_else(|| Error::tensor(name, "it is not there"))?;
        Ok((info.data_offsets.0 as u64, info.data_offsets.1 as u64))
    }

    /// Writes this file with the changes of the plan.
    fn merge(&mut self, plan: &Plan, out: &mut File, advance: &mut dyn FnMut(u64)) -> Result<()> {
        out.write_all(&self.start)?;
        self.file.seek(SeekFrom::Start(self.start.len() as u64))?;
        for name in self.header.offset_keys() {
            let (from, to) = self.range(&name)?;
            match plan.changes(&name) {
                false => {
                    let copied = io::copy(&mut (&mut self.file).take(to - from), out)?;
                    if copied != to - from {
                        return Err(Error::tensor(name, "the file became shorter"));
                    }
                }
                true => {
                    let changed = plan.apply(&name, &self.read(&name, (to - from) as usize)?)?;
                    let Some(changed) = changed else { continue };
                    out.write_all(&View::data(&changed))?;
                }
            }
            advance(to - from);
        }
        Ok(())
    }

    /// The tensor at which the file stands.
    fn read(&mut self, name: &str, size: usize) -> Result<Tensor> {
        let info = self.header.info(name).ok_or_else(|| Error::tensor(name, "it is not there"))?;
        let mut bytes = vec![0; size];
        self.file.read_exact(&mut bytes)?;
        let dtype = DType::try_from(info.dtype).map_err(|e| Error::tensor(name, e))?;
        let count = elements(&info.shape).and_then(|n| n.checked_mul(dtype.size_in_bytes()));
        if count != Some(size) {
            let reason = format!("{size} bytes for {:?} of {dtype:?}", info.shape);
            return Err(Error::tensor(name, reason));
        }
        Tensor::from_raw_buffer(&bytes, dtype, &info.shape, &Device::Cpu)
            .map_err(|e| Error::tensor(name, e))
    }
}
