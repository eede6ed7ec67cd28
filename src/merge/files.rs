//! Merges from file to file, with one weight of the base in memory at a time.

use super::new_tensors::NewTensors;
use super::plan::{Additions, Plan};
use super::tensors::merge_tensors;
use crate::files::fp8::refuse_scaled;
use crate::files::safetensors_file::SafetensorsFile;
use crate::files::shards::Shards;
use crate::files::{atomic_file, is_torch, read, serialize};
use crate::weights::LoraWeights;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, View};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

/// How much of the base has been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeProgress {
    /// Bytes written.
    pub done: u64,
    /// Bytes in total.
    pub total: u64,
}

/// [`merge_into`](crate::merge::merge_into) from file to file. `base` is a checkpoint, the index of a sharded one
/// (`model.safetensors.index.json`), or a folder with either. `out` is a file or a folder for a single
/// file, and another folder for a sharded base; file names are kept.
///
/// A safetensors base is merged tensor by tensor. Unchanged tensors and the header with its metadata are
/// copied byte for byte. Each file appears complete or not at all, an index last. A base that `torch.save`
/// wrote is read whole and written as safetensors.
///
/// Returns the tensors that the merged model has and the base has not: an untied head, in the file of the embeddings, and
/// those of new modules, in the last file.
///
/// # Errors
/// As [`merge_into`](crate::merge::merge_into), for names and shards before anything is written; if `out` is the
/// folder of a sharded base, which a failure would leave half merged; and if a file is malformed or the
/// file system refuses. The error names the file and the tensor.
pub fn merge_files(
    base: impl AsRef<Path>,
    adapter: &LoraWeights,
    out: impl AsRef<Path>,
    mut progress: impl FnMut(MergeProgress),
) -> Result<NewTensors> {
    let (base, out) = (base.as_ref(), out.as_ref());
    let shards = Shards::find(base)?;
    let paths = shards.paths();
    if let (Shards::One(path), true) = (&shards, are_torch(&paths)?) {
        let read = || {
            let base = read(path, &Device::Cpu)?.0;
            merge_tensors(&base, adapter)
        };
        let (tensors, new) = read().map_err(|e: Error| e.at(path))?;
        let bytes = serialize(&tensors, None).map_err(|e| e.at(out))?;
        let target = match path.file_name() {
            Some(name) if out.is_dir() => out.join(name).with_extension("safetensors"),
            _ => out.to_owned(),
        };
        atomic_file::replace(&target, &bytes).map_err(|e| Error::from(e).at(&target))?;
        progress(MergeProgress { done: bytes.len() as u64, total: bytes.len() as u64 });
        return Ok(new);
    }
    let (mut shapes, mut fp8, mut total) = (BTreeMap::new(), BTreeSet::new(), 0);
    for path in &paths {
        let shard = SafetensorsFile::open(path).map_err(|e| e.at(path))?;
        total += shard.length;
        for name in shard.header.offset_keys() {
            let info = shard.header.info(&name);
            fp8.extend(info.filter(|info| info.dtype == Dtype::F8_E4M3).map(|_| name.clone()));
            let shape = info.map(|info| info.shape.clone());
            if shapes.insert(name.clone(), shape).is_some() {
                return Err(Error::tensor(name, "another shard has it too").at(path));
            }
        }
    }
    shards.check(|name| shapes.contains_key(name))?;
    let dims = |name: &str| shapes.get(name).cloned()?;
    let plan = Plan::new(adapter, |name| shapes.contains_key(name), dims, Additions::Modules);
    let plan = plan.map_err(|e| e.at(base))?;
    for name in plan.of_base().filter(|name| fp8.contains(*name)) {
        refuse_scaled(name, |name| shapes.contains_key(name)).map_err(|e| e.at(base))?;
    }
    let (added, mut of_index) = (plan.added().map_err(|e| e.at(base))?, BTreeMap::new());
    for path in &paths {
        let shard = SafetensorsFile::open(path).map_err(|e| e.at(path))?;
        for (head, table) in plan.untied().filter(|(_, table)| shard.info(table).is_ok()) {
            let (Some(file), size) = (path.file_name(), shard.size(table)?) else { continue };
            total += size;
            of_index.insert(head.to_owned(), (file.to_string_lossy().into_owned(), size));
        }
    }
    for (name, tensor) in &added {
        let Some(file) = paths.last().and_then(|path| path.file_name()) else { continue };
        let size = View::data_len(tensor) as u64;
        total += size;
        of_index.insert((*name).to_owned(), (file.to_string_lossy().into_owned(), size));
    }
    let mut done = 0;
    let mut advance = |bytes| {
        done += bytes;
        progress(MergeProgress { done, total });
    };
    let many = matches!(shards, Shards::Many { .. });
    if let Shards::Many { folder, .. } = &shards {
        let same = || {
            fs::create_dir_all(out)?;
            Ok(out.canonicalize()? == folder.canonicalize()?)
        };
        if same().map_err(|e: std::io::Error| Error::from(e).at(out))? {
            let reason = "it is the base's own folder: merge into another one";
            return Err(Error::Invalid(reason.to_owned()).at(out));
        }
    }
    for (i, path) in paths.iter().enumerate() {
        let none = BTreeMap::new();
        let new = if i + 1 == paths.len() { &added } else { &none };
        let target = match path.file_name() {
            Some(name) if many || out.is_dir() => out.join(name),
            _ => out.to_owned(),
        };
        let mut shard = SafetensorsFile::open(path).map_err(|e| e.at(path))?;
        atomic_file::replace_with(&target, |file| {
            merge(&mut shard, &plan, new, file, &mut advance)
        })
        .map_err(|e: Error| e.at(path))?;
    }
    if let Shards::Many { folder, index, .. } = &shards {
        let (from, to) = (folder.join(index), out.join(index));
        let write = || Ok(atomic_file::replace(&to, &with_added(fs::read(&from)?, &of_index)?)?);
        write().map_err(|e: Error| e.at(&to))?;
    }
    Ok(NewTensors::of(&plan, &added))
}

/// The text of an index with further tensors, by name with their files and sizes.
fn with_added(index: Vec<u8>, added: &BTreeMap<String, (String, u64)>) -> Result<Vec<u8>> {
    if added.is_empty() {
        return Ok(index);
    }
    let malformed = |e: serde_json::Error| Error::Invalid(e.to_string());
    let mut index: Value = serde_json::from_slice(&index).map_err(malformed)?;
    for (name, (file, size)) in added {
        index["weight_map"][name] = file.as_str().into();
        if let Some(total) = index["metadata"]["total_size"].as_u64() {
            index["metadata"]["total_size"] = (total + size).into();
        }
    }
    Ok(serde_json::to_string_pretty(&index).map_err(malformed)?.into_bytes())
}

/// Writes `shard` to `out` with the changes of the plan and further tensors.
fn merge(
    shard: &mut SafetensorsFile,
    plan: &Plan,
    added: &BTreeMap<&str, Tensor>,
    out: &mut File,
    advance: &mut dyn FnMut(u64),
) -> Result<()> {
    let untied: Vec<_> = plan.untied().filter(|(_, table)| shard.info(table).is_ok()).collect();
    out.write_all(&shard.start_with(&untied, added)?)?;
    for name in shard.header.offset_keys() {
        if plan.changes(&name) {
            let changed = plan.apply(&name, &shard.read(&name)?)?;
            let Some(changed) = changed else { continue };
            out.write_all(&View::data(&changed))?;
        } else {
            shard.copy(&name, out)?;
        }
        advance(shard.size(&name)?);
    }
    for (head, table) in untied {
        let tensor = shard.read(table)?;
        out.write_all(&View::data(&plan.apply(head, &tensor)?.unwrap_or(tensor)))?;
        advance(shard.size(table)?);
    }
    for tensor in added.values() {
        out.write_all(&View::data(tensor))?;
        advance(View::data_len(tensor) as u64);
    }
    Ok(())
}

fn are_torch(paths: &[std::path::PathBuf]) -> Result<bool> {
    for path in paths {
        let mut start = vec![];
        let read = File::open(path).and_then(|file| file.take(8).read_to_end(&mut start));
        read.map_err(|e| Error::from(e).at(path))?;
        if is_torch(&start) {
            if paths.len() > 1 {
                let reason = "a shard of `torch.save` cannot be merged tensor by tensor";
                return Err(Error::unsupported("this sharded base", reason).at(path));
            }
            return Ok(true);
        }
    }
    Ok(false)
}
