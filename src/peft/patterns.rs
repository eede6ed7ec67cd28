//! `rank_pattern` and `alpha_pattern`: the ranks and alphas of single layers, by patterns of their paths.

use super::entries::Entries;
use super::files::malformed;
use super::module_pattern::ModulePattern;
use crate::Result;
use serde_json::Value;

/// The patterns of a configuration, in the order of the file: the first that matches counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patterns {
    pub(super) ranks: Vec<(ModulePattern, usize)>,
    pub(super) alphas: Vec<(ModulePattern, f64)>,
}

impl Patterns {
    /// The rank of the layer at `path`, if it is not the common one.
    pub fn rank(&self, path: &str) -> Result<Option<usize>> {
        first(&self.ranks, path)
    }

    /// The `lora_alpha` of the layer at `path`, if it is not the common one.
    pub fn alpha(&self, path: &str) -> Result<Option<f64>> {
        first(&self.alphas, path)
    }
}

/// The patterns of one key, whose values `read` understands.
pub(super) fn patterns<T>(
    key: &str,
    entries: Option<&Entries>,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(ModulePattern, T)>> {
    let wrong = |reason: String| malformed(format!("{key}: {reason}"));
    let entry = |(pattern, value): &(String, Value)| {
        let read =
            read(value).ok_or_else(|| wrong(format!("the value of {pattern:?} is {value}")))?;
        Ok((ModulePattern::new(pattern).map_err(wrong)?, read))
    };
    entries.iter().flat_map(|entries| &entries.0).map(entry).collect()
}

/// The value of the first pattern that matches a path.
fn first<T: Copy>(patterns: &[(ModulePattern, T)], path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if pattern.matches(path).map_err(malformed)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}
