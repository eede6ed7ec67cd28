//! What norms and residuals are made of, with gradients for what is trained alone.
//!
//! candle's backward computes and keeps a gradient of every operand, so that frozen gains and biases
//! would cost as much memory again as the activations.

use super::computed::computed;
use candle_core::{Result, Tensor, D};

/// `x·c`, with `c` (n) along the last dimension.
pub fn scaled(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    if c.track_op() {
        let c = spread(c, x)?;
        return if x.track_op() { x * c } else { scaled(&c, x) };
    }
    let c = c.clone();
    computed(x, x.detach().broadcast_mul(&c)?, move |grad| grad.broadcast_mul(&c))
}

/// `x + c`, with a constant `c` of any shape that broadcasts, or a trained one (n) or like `x`.
pub fn shifted(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    if c.track_op() {
        let c = spread(c, x)?;
        return if x.track_op() { x + c } else { shifted(&c, x) };
    }
    computed(x, x.detach().broadcast_add(c)?, |grad| Ok(grad.clone()))
}

/// `c` (n) repeated to the shape of `x`. Its gradient is a sum over rows, which as a product is many
/// times faster than candle's sum.
fn spread(c: &Tensor, x: &Tensor) -> Result<Tensor> {
    if c.shape() == x.shape() {
        return Ok(c.clone());
    }
    let n = c.elem_count();
    computed(c, c.detach().broadcast_as(x.shape())?.contiguous()?, move |grad| {
        let rows = grad.elem_count() / n;
        let ones = Tensor::ones((1, rows), grad.dtype(), grad.device())?;
        ones.matmul(&grad.reshape((rows, n))?)?.reshape(n)
    })
}

/// `(x - mean) / √(variance + eps)` over the last dimension.
pub fn normalized(x: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = |x: &Tensor| x.mean_keepdim(D::Minus1);
    let centred = x.detach().broadcast_sub(&mean(&x.detach())?)?;
    let scale = (mean(&centred.sqr()?)? + eps)?.sqrt()?.recip()?;
    let y = centred.broadcast_mul(&scale)?;
    computed(x, y.clone(), move |grad| {
        let along = y.broadcast_mul(&mean(&(grad * &y)?)?)?;
        (grad - along)?.broadcast_sub(&mean(grad)?)?.broadcast_mul(&scale)
    })
}
