//! The keys of `rank_pattern` and `alpha_pattern`: Python regular expressions that match the end of a path
//! after a dot, as PEFT's `re.match(r"(.*\.)?(KEY)$", path)`.

use crate::utils::names::full_match;
use fancy_regex::Regex;

/// A compiled key.
#[derive(Debug, Clone)]
pub(super) struct ModulePattern(Regex);

impl ModulePattern {
    pub fn new(key: &str) -> Result<Self, String> {
        let compiled = full_match(r"(?:.*\.)?", key);
        compiled.map(Self).map_err(|e| format!("{key:?} is not a regular expression: {e}"))
    }

    /// Whether the whole path, or its end after a dot, matches. An error if matching takes too many
    /// steps.
    pub fn matches(&self, path: &str) -> Result<bool, String> {
        self.0.is_match(path).map_err(|e| format!("{:?} on {path:?}: {e}", self.0.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The right column is Python's: `bool(re.match(rf"(.*\.)?({pattern})$", path))`.
    #[test]
    fn a_pattern_matches_the_end_of_a_path_after_a_dot() -> Result<(), String> {
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
    fn a_pattern_that_takes_forever_is_an_error() -> Result<(), String> {
        let pattern = ModulePattern::new(r"(?=(a+)+b)(a|aa)+\1c")?;
        assert!(pattern.matches(&"a".repeat(64)).is_err());
        Ok(())
    }
}
