//! `modules_to_save` by PEFT's rule: a name means every module whose path ends in it, also within a component:
//! `head` means `lm_head` too. This crate compares whole components.

use super::keys::{self, Key};
use crate::utils::names::{is_within, split};
use crate::utils::AdapterConfig;
use std::iter::successors;

/// Keeps the names of modules that are in the file, in place of other names the paths of the modules that end in
/// them. PEFT lists heads by the task, also those that the model lacks.
pub(super) fn keep_found<'a>(config: &mut AdapterConfig, file: impl Iterator<Item = &'a String>) {
    let names = std::mem::take(&mut config.modules_to_save);
    let (mut used, mut found) = (vec![], vec![]);
    for key in file {
        let Some(Key::Other(name)) = keys::parse(key) else { continue };
        if let Some(module) = names.iter().find(|module| is_within(name, module)) {
            used.push(module);
            continue;
        }
        let ends = |path: &&str| names.iter().any(|module| path.ends_with(module));
        let modules = successors(Some(split(name).0), |path| Some(split(path).0));
        let path = modules.take_while(|path| !path.is_empty()).find(ends).map(str::to_owned);
        found.extend(path.filter(|path| !found.contains(path)));
    }
    config.modules_to_save = names.iter().filter(|name| used.contains(name)).cloned().collect();
    config.modules_to_save.extend(found);
}
