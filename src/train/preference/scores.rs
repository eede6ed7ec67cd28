//! What every preference loss computes with.

use crate::ops::compute_dtype;
use candle_core::{bail, Result, Tensor, D};
use candle_nn::ops::log_softmax;

/// `ln σ(x)`, by a softmax of two classes, which is exact at 0, where training begins, and far from it.
pub(super) fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let classes = Tensor::stack(&[x, &x.zeros_like()?], D::Minus1)?;
    log_softmax(&classes, D::Minus1)?.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)
}

/// `x` in the dtype that losses are computed in.
pub(super) fn computed(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(compute_dtype(x.dtype()))
}

/// An error for an option that is not more than 0.
pub(super) fn positive(name: &str, option: &str, value: f64) -> Result<()> {
    if !(value > 0. && value.is_finite()) {
        bail!("{name}: {option} is {value}, expected more than 0")
    }
    Ok(())
}
