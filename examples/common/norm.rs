//! Layer norm as one node where its gain and bias are frozen.

use crate::computed::computed;
use crate::ops::{normalized, scaled, shifted};
use crate::rows::{by_rows, sum};
use candle_core::{Result, Tensor, D};
use candle_nn::{Init, VarBuilder};
use loralib::{LoraModule, Mode};

pub struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    mode: Mode,
}

impl Norm {
    /// Over the last `n` values, with `weight` and `bias` (n) from `vb`.
    pub fn new(n: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(n, "weight", Init::Const(1.))?;
        let bias = vb.get_with_hints(n, "bias", Init::Const(0.))?;
        Ok(Self { weight, bias, eps, mode: Mode::Train })
    }

    /// (.., n) to (.., n).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let trained = self.weight.track_op() || self.bias.track_op();
        if trained && self.mode == Mode::Train {
            return shifted(&scaled(&normalized(x, self.eps)?, &self.weight)?, &self.bias);
        }
        let (x_, weight, eps) = (x.detach().contiguous()?, self.weight.detach(), self.eps as f32);
        let y = candle_nn::ops::layer_norm(&x_, &weight, &self.bias.detach(), eps)?;
        computed(x, y, move |grad| grad_of(&x_, &grad.broadcast_mul(&weight)?, eps))
    }
}

/// The gradient towards `x`, from that towards `(x - mean) / √(variance + eps)`.
fn grad_of(x: &Tensor, grad: &Tensor, eps: f32) -> Result<Tensor> {
    let fused = by_rows(
        [x, grad],
        #[inline(always)]
        |[x, g], y| {
            let share = 1. / x.len() as f32;
            let mean = sum(x, g, |x, _| x) * share;
            let variance = sum(x, g, |x, _| (x - mean) * (x - mean)) * share;
            let scale = 1. / (variance + eps).sqrt();
            let g_mean = sum(x, g, |_, g| g) * share;
            let along = sum(x, g, |x, g| g * (x - mean)) * scale * scale * share;
            for ((y, g), x) in y.iter_mut().zip(g).zip(x) {
                *y = (g - g_mean - along * (x - mean)) * scale;
            }
        },
    )?;
    match fused {
        Some(grad) => Ok(grad),
        None => {
            let mean = |x: &Tensor| x.mean_keepdim(D::Minus1);
            let x = x.broadcast_sub(&mean(x)?)?;
            let scale = (mean(&x.sqr()?)? + f64::from(eps))?.sqrt()?.recip()?;
            let x = x.broadcast_mul(&scale)?;
            let along = x.broadcast_mul(&mean(&(grad * &x)?)?)?;
            (grad.broadcast_sub(&mean(grad)?)? - along)?.broadcast_mul(&scale)
        }
    }
}

impl LoraModule for Norm {
    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.mode = mode;
        Ok(())
    }
}
