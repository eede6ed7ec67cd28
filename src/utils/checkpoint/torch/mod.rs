//! Files of `torch.save`: a zip archive of a pickle and the storages of the tensors.

mod archive;
mod bytes;
mod object;
mod pickle;
mod tensor;

use crate::utils::state_dict::{check_finite, StateDict};
use crate::{Error, Result};
use archive::{malformed, Archive};
use candle_core::Device;
use object::Object;
use pickle::Pickle;
use std::collections::HashMap;
use tensor::View;

/// Whether a file in one of torch's two formats begins with these bytes.
pub(crate) fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || is_legacy(bytes)
}

/// The format of torch before 1.6: several pickles, the first of them a magic number.
fn is_legacy(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x80\x02\x8a\x0a")
}

/// The tensors of a state dict. Tensors that shared storage share it again.
pub(super) fn parse(bytes: &[u8], device: &Device) -> Result<StateDict> {
    if is_legacy(bytes) {
        return Err(Error::unsupported(
            "the file format of torch before 1.6",
            "load the file with a newer torch and save it again",
        ));
    }
    let mut archive = Archive::open(bytes)?;
    let data = archive.read("data.pkl")?;
    let (pickle, root) = Pickle::read(&data).map_err(malformed)?;
    let Object::Dict(items) = pickle.get(root) else {
        return Err(malformed(format!(
            "it contains {}, expected a state dict",
            pickle.get(root).kind()
        )));
    };
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
