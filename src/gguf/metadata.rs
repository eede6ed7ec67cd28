//! Typed reading of a GGUF file's metadata, with errors that name the key.

use crate::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;

/// The metadata of a file. Every reader returns `None` for a key that the file does not have.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a>(pub &'a HashMap<String, Value>);

impl<'a> Metadata<'a> {
    pub fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key)
    }

    pub fn string(self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub fn bool(self, key: &str) -> Result<Option<bool>> {
        self.read(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// An integer of any width that is not negative.
    pub fn integer(self, key: &str) -> Result<Option<usize>> {
        self.read(key, "an integer that is not negative", integer)
    }

    /// A finite float. An `f32` becomes the `f64` of its shortest decimal, which is the number that
    /// the converter read: 1e-5, not 9.999999747378752e-6.
    pub fn float(self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a finite float", |value| match value {
            Value::F32(x) => x.to_string().parse().ok().filter(|x: &f64| x.is_finite()),
            Value::F64(x) => Some(*x).filter(|x| x.is_finite()),
            _ => None,
        })
    }

    /// An array whose every item `item` can read.
    pub fn array<T>(
        self,
        key: &str,
        what: &str,
        item: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        self.read(key, &format!("an array of {what}"), |value| match value {
            Value::Array(items) => items.iter().map(item).collect(),
            _ => None,
        })
    }

    fn read<T>(
        self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || {
            Error::Invalid(format!("GGUF metadata {key:?} is {}, expected {expected}", show(value)))
        };
        read(value).map(Some).ok_or_else(wrong)
    }
}

/// The value of a key that the file must have.
pub(super) fn required<T>(key: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| Error::Invalid(format!("GGUF metadata has no {key:?}")))
}

/// An integer of any width, if it is not negative.
pub(super) fn integer(value: &Value) -> Option<usize> {
    match *value {
        Value::U8(n) => Some(n.into()),
        Value::U16(n) => Some(n.into()),
        Value::U32(n) => n.try_into().ok(),
        Value::U64(n) => n.try_into().ok(),
        Value::I8(n) => n.try_into().ok(),
        Value::I16(n) => n.try_into().ok(),
        Value::I32(n) => n.try_into().ok(),
        Value::I64(n) => n.try_into().ok(),
        _ => None,
    }
}

/// A value in an error: arrays may be as long as a vocabulary.
fn show(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("an array of {} items", items.len()),
        value => format!("{value:?}"),
    }
}
