//! GPT-2's GELU as one node; candle's takes many passes in a backward.

use crate::computed::computed;
use candle_core::{Result, Tensor};

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
