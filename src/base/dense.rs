//! A base without placeholders.

use super::source::{Source, Wanted};
use crate::layers::binding::dequantized;
use crate::Result;
use candle_core::Tensor;

/// A source in which quantised weights are dequantised.
pub(crate) struct Dense<S>(pub S);

impl<S: Source> Source for Dense<S> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        Ok(dequantized(self.0.tensor(name, wanted)?)?)
    }

    fn has(&self, name: &str) -> bool {
        self.0.has(name)
    }
}
