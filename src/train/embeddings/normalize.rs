//! Rows of length 1.

use crate::ops::compute_dtype;
use candle_core::{Result, Tensor, D};

/// Each row of `x` (.., d) divided by its length, in F32, or F64 for F64: `torch.nn.functional.normalize`. A row of zeros
/// stays.
///
/// # Errors
/// If `x` is a scalar.
pub fn normalize(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(compute_dtype(x.dtype()))?;
    // torch's smallest length, 1e-12.
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.maximum(1e-24)?.sqrt()?;
    x.broadcast_div(&length)
}
