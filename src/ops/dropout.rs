//! Inverted dropout as a mask that forward and backward share.

use candle_core::{DType, Result, Tensor};

/// A mask of `x`'s shape: 0 with probability `p`, else 1 / (1 - p). `None` if `p` is 0, or `x`
/// has no values.
pub(crate) fn dropout_mask(x: &Tensor, p: f32, dtype: DType) -> Result<Option<Tensor>> {
    if p == 0. || x.elem_count() == 0 {
        return Ok(None);
    }
    let kept = Tensor::rand(0f32, 1f32, x.shape(), x.device())?.ge(p)?;
    Ok(Some((kept.to_dtype(dtype)? * (1. / (1. - f64::from(p))))?))
}
