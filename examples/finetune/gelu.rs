//! GPT-2's GELU as one node; candle's takes many passes in a backward.

use crate::nn::computed::computed;
use crate::nn::exp::exp_negative;
use crate::nn::rows::by_rows;
use candle_core::{Result, Tensor};

/// z's factors: `z = √(2/π)·(x + 0.044715·x³)`.
const LINEAR: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715 * LINEAR;

/// GPT-2's `gelu_new`: `x/2·(1 + tanh z)`, which is `x·σ(2z)`.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    let x_ = x.detach();
    let fused = by_rows(
        [&x_],
        #[inline(always)]
        |[x], y| y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * sigmoid(x)),
    )?;
    let y = match fused {
        Some(y) => y,
        None => x_.gelu()?.into(),
    };
    computed(x, y, move |grad| {
        let fused = by_rows(
            [&x_, grad],
            #[inline(always)]
            |[x, grad], y| {
                y.iter_mut().zip(x).zip(grad).for_each(|((y, &x), g)| {
                    let s = sigmoid(x);
                    let slope = 2. * (LINEAR + 3. * CUBIC * x * x);
                    *y = g * (s + x * s * (1. - s) * slope);
                });
            },
        )?;
        match fused {
            Some(gx) => gx.tensor(),
            None => {
                let (linear, cubic) = (f64::from(LINEAR), f64::from(CUBIC));
                let square = x_.sqr()?;
                let tanh = (&x_ * square.affine(cubic, linear)?)?.tanh()?;
                let slope =
                    (tanh.sqr()?.affine(-0.5, 0.5)? * square.affine(3. * cubic, linear)?)?;
                grad * ((&x_ * slope)? + tanh.affine(0.5, 0.5)?)?
            }
        }
    })
}

/// `σ(2z)`
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let z2 = 2. * x * (LINEAR + CUBIC * x * x);
    let e = exp_negative(-z2.abs());
    (if z2 < 0. { e } else { 1. }) / (1. + e)
}
