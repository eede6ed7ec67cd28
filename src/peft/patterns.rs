//! `rank_pattern` and `alpha_pattern`: the ranks and alphas of single layers, by patterns of their paths.

use super::files::malformed;
use super::module_pattern::ModulePattern;
use crate::{Error, Result};
use serde_json::Value;

/// The patterns of a configuration.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patterns {
    pub(super) ranks: Vec<(ModulePattern, usize)>,
    pub(super) alphas: Vec<(ModulePattern, f64)>,
}

impl Patterns {
    /// The rank of the layer at `path`, if it is not the common one.
    pub fn rank(&self, path: &str) -> Result<Option<usize>> {
        own(&self.ranks, path)
    }

    /// The `lora_alpha` of the layer at `path`, if it is not the common one.
    pub fn alpha(&self, path: &str) -> Result<Option<f64>> {
        own(&self.alphas, path)
    }
}

/// The patterns of one key, whose values `read` understands.
pub(super) fn patterns<T>(
    key: &str,
    value: &Value,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(ModulePattern, T)>> {
    let wrong = |reason: String| malformed(format!("{key}: {reason}"));
    let map =
        value.as_object().ok_or_else(|| wrong(format!("it is {value}, expected an object")))?;
    map.iter()
        .map(|(pattern, value)| {
            let read =
                read(value).ok_or_else(|| wrong(format!("the value of {pattern:?} is {value}")))?;
            Ok((ModulePattern::new(pattern).map_err(wrong)?, read))
        })
        .collect()
}

/// The value of the patterns that match a path. PEFT takes the first in the order of the file, which is
/// not known here.
fn own<T: Copy + PartialEq>(patterns: &[(ModulePattern, T)], path: &str) -> Result<Option<T>> {
    let mut found = None;
    for (pattern, value) in patterns {
        if !pattern.matches(path).map_err(malformed)? {
            continue;
        }
        if found.is_some_and(|found| found != *value) {
            let reason = format!("the first of several patterns that match {path:?} is not known");
            return Err(Error::unsupported("an adapter with ambiguous patterns", reason));
        }
        found = Some(*value);
    }
    Ok(found)
}
