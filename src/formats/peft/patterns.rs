//! `rank_pattern` and `alpha_pattern`: the ranks and alphas of single layers by Python regular expressions, which match
//! the end of a path after a dot, as PEFT's `re.match(r"(.*\.)?(KEY)$", path)`.

use super::folder::malformed;
use crate::regex::full_match;
use crate::Result;
use fancy_regex::Regex;
use indexmap::IndexMap;

/// The patterns of a configuration, in the order of the file: the first that matches counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patterns {
    ranks: Vec<(ModulePattern, usize)>,
    alphas: Vec<(ModulePattern, f64)>,
}

impl Patterns {
    pub fn new(ranks: IndexMap<String, usize>, alphas: IndexMap<String, f64>) -> Result<Self> {
        let (ranks, alphas) =
            (compiled("rank_pattern", ranks)?, compiled("alpha_pattern", alphas)?);
        Ok(Self { ranks, alphas })
    }

    /// The rank of the layer at `path`, if it is not the common one.
    pub fn rank(&self, path: &str) -> Result<Option<usize>> {
        first(&self.ranks, path)
    }

    /// The `lora_alpha` of the layer at `path`, if it is not the common one.
    pub fn alpha(&self, path: &str) -> Result<Option<f64>> {
        first(&self.alphas, path)
    }
}

fn compiled<T>(key: &str, patterns: IndexMap<String, T>) -> Result<Vec<(ModulePattern, T)>> {
    let compile = |(pattern, value): (String, T)| {
        let compiled = ModulePattern::new(&pattern);
        Ok((compiled.map_err(|reason| malformed(format!("{key}: {reason}")))?, value))
    };
    patterns.into_iter().map(compile).collect()
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

/// A compiled key.
#[derive(Debug, Clone)]
pub(super) struct ModulePattern(Regex);

impl ModulePattern {
    pub fn new(key: &str) -> std::result::Result<Self, String> {
        let compiled = full_match(r"(?:.*\.)?", key);
        compiled.map(Self).map_err(|e| format!("{key:?} is not a regular expression: {e}"))
    }

    /// Whether the whole path, or its end after a dot, matches. An error if matching takes too many
    /// steps.
    pub fn matches(&self, path: &str) -> std::result::Result<bool, String> {
        self.0.is_match(path).map_err(|e| format!("{:?} on {path:?}: {e}", self.0.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The right column is Python's: `bool(re.match(rf"(.*\.)?({pattern})$", path))`.
    #[test]
    fn a_pattern_matches_the_end_of_a_path_after_a_dot() -> std::result::Result<(), String> {
        let all = [
            ("q", "layers.0.q", true),
            ("q", "layers.0.eq", false),
            ("q", "q", true),
            ("q", "layers.q.0", false),
            ("layers.0.q", "model.layers.0.q", true),
            ("^layers.0.q", "model.layers.0.q", false),
            ("^layers.0.q$", "layers.0.q", true),
            (r"layers\.\d+\.q", "layers.12.q", true),
            (r"layers\.\d+\.q", "layers.x.q", false),
            (r"layers.*q", "model.layers.1.attn.q", true),
            (r"layers.*q", "model.layers.1.attn.k", false),
            ("ab?c+", "ac", true),
            ("ab?c+", "abbc", false),
            ("ab?c+", "abccc", true),
            (r"\w+", "a.b_1", true),
            (r"q\.o", "qxo", false),
            ("", "a", false),
            (".*", "", true),
            ("q|k", "layers.0.k", true),
            ("(q|k)_proj", "layers.0.q_proj", true),
            ("(q|k)_proj", "layers.0.v_proj", false),
            (r"layers\.([0-3]|1[0-9])\.q", "layers.12.q", true),
            (r"layers\.([0-3]|1[0-9])\.q", "layers.22.q", false),
            (r"layers\.\d{2}\.q", "layers.12.q", true),
            (r"layers\.[13]\.q", "layers.2.q", false),
            (r"(?!.*vision).*\.q", "model.text.q", true),
            (r"^(?!.*vision).*\.q", "model.vision.q", false),
            (r".*\bq", "layers.0.q", true),
            (r"[\[0]", "layers.0", true),
        ];
        for (pattern, path, expected) in all {
            let pattern = ModulePattern::new(pattern)?;
            assert_eq!(pattern.matches(path)?, expected, "{pattern:?} {path}");
        }
        // Python reads "[[0]" as a class, and refuses flags behind a text.
        assert!(ModulePattern::new("(?i)Q")?.matches("layers.0.q")?);
        for bad in ["(a", "[ab", "*", "\\", "a)|(b", "[[0]"] {
            assert!(ModulePattern::new(bad).is_err(), "{bad}");
        }
        Ok(())
    }

    #[test]
    fn a_pattern_that_takes_forever_is_an_error() -> std::result::Result<(), String> {
        let pattern = ModulePattern::new(r"(?=(a+)+b)(a|aa)+\1c")?;
        assert!(pattern.matches(&"a".repeat(64)).is_err());
        Ok(())
    }
}
