//! Which matrices of a base stay as they are stored, in blocks, and a base of which none does.

use super::source::{Source, Wanted};
use crate::layers::binding::placeholder::dequantized;
use crate::Result;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};

/// Whether a model gets a placeholder for a tensor that is stored in this dtype. Half precision stays for a model that
/// computes in more, and not on devices: there candle decodes it on the host.
pub(crate) fn stays_quantized(stored: GgmlDType, dims: &[usize], wanted: &Wanted) -> bool {
    let in_blocks = match stored {
        GgmlDType::F32 => false,
        GgmlDType::F16 | GgmlDType::BF16 => {
            wanted.device.is_cpu() && matches!(wanted.dtype, DType::F32 | DType::F64)
        }
        _ => true,
    };
    dims.len() == 2 && in_blocks
}

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
