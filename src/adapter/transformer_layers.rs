//! Which transformer layers are adapted, by PEFT's rules for `layers_to_transform` and `layers_pattern`.

use crate::regex::compile_between;
use fancy_regex::Regex;

/// Indices of transformer layers, and where in a path the index is.
#[derive(Debug, Clone, Default)]
pub(crate) struct TransformerLayers {
    /// Empty for all layers.
    pub indices: Vec<usize>,
    patterns: Vec<(String, Result<Regex, String>)>,
}

impl TransformerLayers {
    /// The index follows one of these names, which are regular expressions.
    pub fn set_patterns(&mut self, names: impl Iterator<Item = String>) {
        // PEFT does not put the name into a group: alternatives in it reach to both ends.
        let compile = |name: &str| compile_between(r"\A(?:(?:^|.*?\.)", name, r"\.(\d+)\.)");
        self.patterns = names.map(|name| (name.clone(), compile(&name))).collect();
    }

    /// An error for an invalid pattern, or one that has no effect.
    pub fn valid(&self) -> Result<(), String> {
        for (name, pattern) in &self.patterns {
            if let Err(error) = pattern {
                return Err(format!(
                    "the layers' pattern {name:?} is no regular expression: {error}"
                ));
            }
            if self.indices.is_empty() {
                return Err(format!("the layers' pattern {name:?} needs the indices, by `layers`"));
            }
        }
        Ok(())
    }

    /// Whether the layer at `path` is in one of the transformer layers.
    pub fn contain(&self, path: &str) -> bool {
        let index = || self.index(path)?.parse().ok();
        self.indices.is_empty() || index().is_some_and(|index| self.indices.contains(&index))
    }

    fn index<'a>(&self, path: &'a str) -> Option<&'a str> {
        if self.patterns.is_empty() {
            return first_number(path);
        }
        let matching = |(_, pattern): &(_, Result<Regex, String>)| {
            pattern.as_ref().ok()?.captures(path).ok()?
        };
        let found = self.patterns.iter().find_map(matching)?;
        // The index is the last group, after the name's own.
        found.get(found.len() - 1).map(|index| index.as_str())
    }

    /// What an error says of targets that match no layer.
    pub fn hint(&self) -> &'static str {
        match (&*self.indices, &*self.patterns) {
            ([], _) => "",
            (_, []) => {
                " in the chosen transformer layers: for an index at the start of a path, as in \
                 \"layers.0.q_proj\", set `layers_pattern`"
            }
            _ => " in the chosen transformer layers",
        }
    }
}

/// The first number between dots, after two other components or more.
fn first_number(path: &str) -> Option<&str> {
    let mut components = path.split('.');
    components.next_back();
    let number = |text: &&str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    components.skip(2).find(number)
}
