//! Names of modules that torch wraps around a model, and that are part of the names in its state dict.

use super::names::without_wrappers;
use super::state_dict::StateDict;
use crate::{Error, Result};

/// The tensors without the names that `torch.compile` and `torch.nn.DataParallel` add: each component
/// `_orig_mod`, and `module.` if all names begin with it.
///
/// # Errors
/// If two tensors then have one name.
pub fn strip_wrappers(tensors: StateDict) -> Result<StateDict> {
    let parallel = tensors.keys().all(|name| name.starts_with("module."));
    let mut stripped = StateDict::new();
    for (name, tensor) in tensors {
        if stripped.insert(without_wrappers(&name, parallel), tensor).is_some() {
            return Err(Error::tensor(name, "without its wrappers another tensor has its name"));
        }
    }
    Ok(stripped)
}
