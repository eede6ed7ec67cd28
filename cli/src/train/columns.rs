//! The names of a data file's columns.

use serde_json::Value;
use std::collections::BTreeMap;
use std::str::FromStr;

/// What the columns are called, where it is not by the usual names.
#[derive(Debug, Clone, Default)]
pub struct Columns(BTreeMap<String, String>);

/// The names that [`Columns`] can replace.
const NAMES: [&str; 15] = [
    "text",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "label",
    "anchor",
    "positive",
    "negative",
];

impl FromStr for Columns {
    type Err = String;

    /// `text=body`, or `prompt=question,completion=answer`.
    fn from_str(text: &str) -> Result<Self, String> {
        let pair = |pair: &str| match pair.split_once('=') {
            Some((name, own)) if NAMES.contains(&name) && !own.is_empty() => {
                Ok((name.to_owned(), own.to_owned()))
            }
            _ => Err(format!("{pair:?}: expected NAME=COLUMN with one of the names {NAMES:?}")),
        };
        Ok(Self(text.split(',').map(pair).collect::<Result<_, _>>()?))
    }
}

impl Columns {
    /// Whether one of the names above is replaced.
    pub fn names(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A column that is named and that an entry does not have.
    pub fn missing<'a>(&'a self, entry: &Value) -> Option<&'a str> {
        // Some pairs have no negative.
        let needed = self.0.iter().filter(|(name, _)| *name != "negative");
        needed.map(|(_, own)| own.as_str()).find(|own| entry.get(own).is_none())
    }

    /// A column of an entry, by one of the names above.
    pub fn of<'a>(&self, entry: &'a Value, name: &str) -> &'a Value {
        &entry[self.0.get(name).map_or(name, String::as_str)]
    }

    /// The same, if it is a text.
    pub fn text(&self, entry: &Value, name: &str) -> Option<String> {
        self.of(entry, name).as_str().map(str::to_owned)
    }
}
