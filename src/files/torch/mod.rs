//! Files of `torch.save`: a zip archive of a pickle and the storages of the tensors.

mod archive;
mod bytes;
mod object;
mod pickle;
mod tensor;

use super::state_dict::{check_finite, StateDict};
use crate::{Error, Result};
use archive::{malformed, Archive};
use candle_core::Device;
use object::{Id, Object};
use pickle::Pickle;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use tensor::View;

/// Reads the state dict in one entry of a file that `torch.save` wrote, as training programs save it beside an
/// optimizer: `"state_dict"` of Lightning, `"model"`, or `"model_state_dict"`.
/// [`read_state_dict`](crate::utils::read_state_dict) lists the entries of such a file in its error.
///
/// # Errors
/// As `read_state_dict`, if the file is not torch's, and if it has no such entry.
pub fn read_torch_entry(path: impl AsRef<Path>, entry: &str, device: &Device) -> Result<StateDict> {
    let path = path.as_ref();
    let read = || match fs::read(path)? {
        bytes if is_torch(&bytes) => parse(&bytes, Some(entry), device),
        _ => Err(Error::Format { format: "torch", reason: "it is no zip archive".to_owned() }),
    };
    read().map_err(|e| e.at(path))
}

/// Whether a file in one of torch's two formats begins with these bytes.
pub(crate) fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || is_legacy(bytes)
}

/// The format of torch before 1.6: several pickles, the first of them a magic number.
fn is_legacy(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x80\x02\x8a\x0a")
}

/// The tensors of a state dict, which is the whole file or the given entry of it. Tensors that shared storage
/// share it again.
pub(super) fn parse(bytes: &[u8], entry: Option<&str>, device: &Device) -> Result<StateDict> {
    if is_legacy(bytes) {
        return Err(Error::unsupported(
            "the file format of torch before 1.6",
            "load the file with a newer torch and save it again",
        ));
    }
    let mut archive = Archive::open(bytes)?;
    let data = archive.read("data.pkl")?;
    let (pickle, root) = Pickle::read(&data).map_err(malformed)?;
    let items = state_dict(&pickle, root, entry)?;
    let (mut storages, mut tensors) = (HashMap::new(), StateDict::new());
    for &(key, value) in items {
        let Object::Text(name) = *pickle.get(key) else {
            return Err(malformed(format!("the name of an entry is {}", pickle.get(key).kind())));
        };
        let mut read = || {
            let view = View::read(&pickle, value)?;
            if !storages.contains_key(view.storage) {
                let storage = archive.storage(&view, device)?;
                storages.insert(view.storage.to_owned(), storage);
            }
            let Some(storage) = storages.get(view.storage) else { return Err("lost".to_owned()) };
            view.tensor(storage)
        };
        let tensor = read().map_err(|reason| Error::tensor(name, reason))?;
        check_finite(name, &tensor)?;
        if tensors.insert(name.to_owned(), tensor).is_some() {
            return Err(Error::tensor(name, "the file has it twice"));
        }
    }
    Ok(tensors)
}

type Items = [(Id, Id)];

/// The items of the state dict.
fn state_dict<'p>(pickle: &'p Pickle, root: Id, entry: Option<&str>) -> Result<&'p Items> {
    let dict = |id| match pickle.get(id) {
        Object::Dict(items) => Ok(items.as_slice()),
        other => Err(format!("{}, expected a state dict", other.kind())),
    };
    let items = dict(root).map_err(|kind| malformed(format!("it contains {kind}")))?;
    let inner = || {
        items.iter().filter_map(|&(key, value)| match (pickle.get(key), pickle.get(value)) {
            (Object::Text(name), Object::Dict(_)) => Some(*name),
            _ => None,
        })
    };
    let Some(entry) = entry else {
        let Some(first) = inner().next() else { return Ok(items) };
        let all: Vec<_> = inner().collect();
        let reason = format!(
            "a dict, not a tensor: the file has the dicts {all:?}; read the one with the model's \
             tensors by `read_torch_entry`"
        );
        return Err(Error::tensor(first, reason));
    };
    let found = |(key, _): &&(Id, Id)| *pickle.get(*key) == Object::Text(entry);
    match items.iter().find(found) {
        Some((_, value)) => {
            dict(*value).map_err(|kind| malformed(format!("its entry {entry:?} is {kind}")))
        }
        None => {
            let all: Vec<_> = inner().collect();
            Err(malformed(format!("it has no entry {entry:?}, but the dicts {all:?}")))
        }
    }
}
