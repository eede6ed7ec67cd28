//! `modules_to_save` by PEFT's rule: a name means every module whose path ends in it, also within a component:
//! `head` means `lm_head` too. This crate compares whole components.

use super::keys::{self, Key};
use crate::utils::names::{is_within, split};
use crate::utils::AdapterConfig;

/// Adds the paths of modules that are in the file by the end of a component alone.
pub(super) fn add_found<'a>(config: &mut AdapterConfig, file: impl Iterator<Item = &'a String>) {
    for key in file {
        let Some(Key::Other(name)) = keys::parse(key) else { continue };
        if config.modules_to_save.iter().any(|module| is_within(name, module)) {
            continue;
        }
        let ends = |path: &&str| config.modules_to_save.iter().any(|module| path.ends_with(module));
        let modules = std::iter::successors(Some(split(name).0), |path| Some(split(path).0));
        let found = modules.take_while(|path| !path.is_empty()).find(ends).map(str::to_owned);
        config.modules_to_save.extend(found);
    }
}
