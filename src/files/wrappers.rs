//! Names of modules that torch wraps around a model, and that are part of the names in its state dict.

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

/// An error if one of the missing names is one of the unexpected ones without wrappers.
pub(crate) fn refuse_wrapped_names(unexpected: &[String], missing: &[String]) -> Result<()> {
    let wrapped = |name: &&String| {
        let stripped = without_wrappers(name, name.starts_with("module."));
        stripped != **name && missing.contains(&stripped)
    };
    match unexpected.iter().find(wrapped) {
        None => Ok(()),
        Some(name) => Err(Error::tensor(
            name,
            "the model was compiled or parallel when it was saved, and `_orig_mod` or `module` is in \
             its names: load `strip_wrappers(tensors)`",
        )),
    }
}

/// A name without the components `_orig_mod` and, if the model was `parallel`, without `module.` at its start.
fn without_wrappers(name: &str, parallel: bool) -> String {
    let rest = if parallel { name.strip_prefix("module.").unwrap_or(name) } else { name };
    let components: Vec<_> =
        rest.split('.').filter(|component| *component != "_orig_mod").collect();
    components.join(".")
}
