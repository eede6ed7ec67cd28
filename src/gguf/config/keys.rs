//! The metadata keys of one architecture, which start with its name.

use crate::gguf::metadata::{integer, required, Metadata};
use crate::{Error, Result};
use candle_core::quantized::gguf_file::Value;

pub(super) struct Keys<'a> {
    pub architecture: &'a str,
    pub metadata: Metadata<'a>,
}

/// Keys of other models, which would change what this one computes.
const UNSUPPORTED: [&str; 7] = [
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "embedding_scale",
    "expert_count",
    "logit_scale",
    "residual_scale",
];

impl Keys<'_> {
    pub fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.metadata.string(&self.name(key))
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.metadata.float(&self.name(key))
    }

    pub fn required_float(&self, key: &str) -> Result<f64> {
        required(&self.name(key), self.float(key)?)
    }

    pub fn integer(&self, key: &str) -> Result<Option<usize>> {
        self.metadata.integer(&self.name(key))
    }

    /// An integer that is not 0.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        match self.integer(key)? {
            Some(0) => Err(Error::Invalid(format!("GGUF metadata {:?} is 0", self.name(key)))),
            size => Ok(size),
        }
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        required(&self.name(key), self.optional_size(key)?)
    }

    /// Every how many layers one is without a sliding window: a number, or a flag for every layer.
    pub fn sliding_window_pattern(&self) -> Result<Option<usize>> {
        let key = "attention.sliding_window_pattern";
        let name = self.name(key);
        if !matches!(self.metadata.get(&name), Some(Value::Array(_))) {
            return self.optional_size(key);
        }
        let flag = |value: &Value| value.to_bool().ok();
        let slides = required(&name, self.metadata.array(&name, "booleans", flag)?)?;
        let period = slides.iter().take_while(|slides| **slides).count() + 1;
        match slides.iter().enumerate().all(|(i, slides)| *slides == ((i + 1) % period > 0)) {
            true => Ok(Some(period)),
            false => Err(Error::unsupported(
                format!("the GGUF metadata {name:?}"),
                "the layers without a window do not recur with one period",
            )),
        }
    }

    /// An error for metadata that no configuration can tell.
    pub fn refuse_unsupported(&self) -> Result<()> {
        // a 0 switches them off
        let set = |key: &&&str| match self.metadata.get(&self.name(key)) {
            None => false,
            Some(Value::F32(x)) => *x != 0.,
            Some(value) => integer(value) != Some(0),
        };
        let window = "attention.sliding_window";
        let windowless = matches!(self.architecture, "qwen2" | "qwen3" | "gemma");
        let key = UNSUPPORTED.iter().chain(windowless.then_some(&window)).find(set);
        if let Some(key) = key {
            return Err(Error::unsupported(
                format!("the GGUF metadata {:?}", self.name(key)),
                format!("a plain {} has none", self.architecture),
            ));
        }
        if self.metadata.bool(&self.name("attention.causal"))? == Some(false) {
            let reason = format!("a plain {} has one", self.architecture);
            return Err(Error::unsupported("attention without a causal mask", reason));
        }
        Ok(())
    }
}
