//! Layer norm as one node where its gain and bias are frozen.

use super::computed::computed;
use super::ops::{normalized, scaled, shifted};
use super::rows::{by_rows, sum};
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
        let (x_, weight, bias) = (x.detach(), self.weight.detach(), self.bias.detach());
        let (x_, eps) = (x_.contiguous()?, self.eps as f32);
        let fused = by_rows(
            [&x_, &weight, &bias],
            #[inline(always)]
            |[x, weight, bias], y| {
                let (mean, scale) = moments(x, eps);
                for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                    *y = (x - mean) * scale * weight + bias;
                }
            },
        )?;
        let y = match fused {
            Some(y) => y,
            None => candle_nn::ops::layer_norm(&x_, &weight, &bias, eps)?.into(),
        };
        computed(x, y, move |grad| grad_of(&x_, grad, &weight, eps))
    }
}

/// A row's mean, and `1 / √(variance + eps)`.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let share = 1. / x.len() as f32;
    let mean = sum(x, x, |x, _| x) * share;
    let variance = sum(x, x, |x, _| (x - mean) * (x - mean)) * share;
    (mean, 1. / (variance + eps).sqrt())
}

/// The gradient towards `x`, from that towards `(x - mean) / √(variance + eps) · weight`.
fn grad_of(x: &Tensor, grad: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let fused = by_rows(
        [x, grad, weight],
        #[inline(always)]
        |[x, grad, weight], g| {
            let (mean, scale) = moments(x, eps);
            g.iter_mut().zip(grad).zip(weight).for_each(|((g, grad), w)| *g = grad * w);
            let share = 1. / x.len() as f32;
            let g_mean = sum(g, g, |g, _| g) * share;
            let along = sum(x, g, |x, g| g * (x - mean)) * scale * scale * share;
            for (g, x) in g.iter_mut().zip(x) {
                *g = (*g - g_mean - along * (x - mean)) * scale;
            }
        },
    )?;
    match fused {
        Some(grad) => grad.tensor(),
        None => {
            let grad = grad.broadcast_mul(weight)?;
            let mean = |x: &Tensor| x.mean_keepdim(D::Minus1);
            let x = x.broadcast_sub(&mean(x)?)?;
            let scale = (mean(&x.sqr()?)? + f64::from(eps))?.sqrt()?.recip()?;
            let x = x.broadcast_mul(&scale)?;
            let along = x.broadcast_mul(&mean(&(&grad * &x)?)?)?;
            (grad.broadcast_sub(&mean(&grad)?)? - along)?.broadcast_mul(&scale)
        }
    }
}

impl LoraModule for Norm {
    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.mode = mode;
        Ok(())
    }
}
