//! The keys of `adapter_config.json` with their values, read one by one, so that an error names the key.

use super::folder::malformed;
use crate::files::without_byte_order_mark;
use crate::{Error, Result};
use indexmap::IndexMap;
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::Value;

/// The keys with their texts in the order of the file, which counts in `rank_pattern` and `alpha_pattern`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Fields(pub IndexMap<String, Box<RawValue>>);

impl Fields {
    pub fn parse(text: &[u8]) -> Result<Self> {
        serde_json::from_slice(without_byte_order_mark(text)).map_err(malformed)
    }

    pub(super) fn value(&self, key: &str) -> Option<Value> {
        serde_json::from_str(self.0.get(key)?.get()).ok()
    }

    /// [`get`](Self::get), after which the key is not `unknown`.
    pub(super) fn take<T: DeserializeOwned>(
        &self,
        key: &str,
        unknown: &mut Vec<&String>,
    ) -> Result<Option<T>> {
        unknown.retain(|other| *other != key);
        self.get(key)
    }

    /// The value of a key, unless it is null, false or empty.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.0.get(key).filter(|_| self.is_set(key)) else { return Ok(None) };
        let value = serde_json::from_str(text.get());
        value.map(Some).map_err(|_| self.wrong(key))
    }

    /// The patterns of a key in their order, with values that are `valid`.
    pub(super) fn patterns<T: DeserializeOwned>(
        &self,
        key: &str,
        unknown: &mut Vec<&String>,
        valid: impl Fn(&T) -> bool,
    ) -> Result<IndexMap<String, T>> {
        let Ok(texts) = self.take::<IndexMap<String, Box<RawValue>>>(key, unknown) else {
            return Err(malformed(format!("{key} = {}, expected an object", self.text(key))));
        };
        let entry =
            |(pattern, text): (String, Box<RawValue>)| match serde_json::from_str(text.get())
                .ok()
                .filter(&valid)
            {
                Some(value) => Ok((pattern, value)),
                None => Err(malformed(format!("{key}: the value of {pattern:?} is {text}"))),
            };
        texts.unwrap_or_default().into_iter().map(entry).collect()
    }

    pub(super) fn is_set(&self, key: &str) -> bool {
        let Some(text) = self.0.get(key) else { return false };
        match serde_json::from_str(text.get()) {
            Ok(Value::Null | Value::Bool(false)) => false,
            Ok(Value::String(text)) => !text.is_empty(),
            Ok(Value::Array(items)) => !items.is_empty(),
            Ok(Value::Object(items)) => !items.is_empty(),
            // A number or a nesting beyond what a value represents is not nothing.
            Ok(_) | Err(_) => true,
        }
    }

    /// The value as errors show it: as the file has it, if nothing else represents it.
    fn text(&self, key: &str) -> String {
        let text = || self.0.get(key).map_or("null", |text| text.get()).to_owned();
        self.value(key).map_or_else(text, |value| value.to_string())
    }

    pub(super) fn wrong(&self, key: &str) -> Error {
        malformed(format!("{key} = {}", self.text(key)))
    }

    pub(super) fn unsupported(&self, key: &str, reason: &str) -> Error {
        Error::unsupported(format!("the option {key} = {}", self.text(key)), reason)
    }
}

/// One value, or several.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> From<OneOrMany<T>> for Vec<T> {
    fn from(values: OneOrMany<T>) -> Self {
        match values {
            OneOrMany::One(value) => vec![value],
            OneOrMany::Many(values) => values,
        }
    }
}
