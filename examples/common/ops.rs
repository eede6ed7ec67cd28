//! Operations whose value is computed without a graph and whose backward is written out.
//!
//! candle's softmax, norm and gelu either cut the graph (the fused ones) or take many passes; and
//! its backward computes and keeps a gradient of every operand, so that frozen gains and biases and
//! the mask would cost as much memory again as the activations.

use crate::computed::computed;
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

/// The softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let y = candle_nn::ops::softmax_last_dim(&x.detach())?;
    computed(x, y.clone(), move |grad| {
        let g = (grad * &y)?;
        &g - y.broadcast_mul(&g.sum_keepdim(D::Minus1)?)?
    })
}

/// GPT-2's `gelu_new`: `x/2·(1 + tanh z)` with `z = √(2/π)·(x + 0.044715·x³)`.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    let (c, cubic) = ((2. / std::f64::consts::PI).sqrt(), 0.044715);
    let x_ = x.detach();
    let square = x_.sqr()?;
    let tanh = (&x_ * square.affine(c * cubic, c)?)?.tanh()?;
    let y = (&x_ * tanh.affine(0.5, 0.5)?)?;
    computed(x, y, move |grad| {
        let slope = (tanh.sqr()?.affine(-0.5, 0.5)? * square.affine(3. * c * cubic, c)?)?;
        grad * ((&x_ * slope)? + tanh.affine(0.5, 0.5)?)?
    })
}
