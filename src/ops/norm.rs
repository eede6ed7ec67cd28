//! Layer norm and RMS norm over the last dimension: `y = x̂ ∘ w + b` with `x̂ = (x - mean)·s` and
//! `s = 1/√(mean((x - mean)²) + eps)`; RMS norm has no mean and no b.
//!
//! Backward, with `h = g ∘ w`: `gx = s·(h - mean(h) - x̂·mean(h ∘ x̂))`, `gw = Σ g ∘ x̂` and `gb = Σ g`
//! over the rows. A frozen gain or bias costs no gradient.

use super::cpu::{map_rows, map_tensor_rows, sum};
use super::elementwise::{mul_frozen, plus_bias};
use super::linear::matmul::matmul;
use super::op::{compute_dtype, if_tracked, run, Fused, Grads, Operand};
use candle_core::{bail, CpuStorage, DType, Result, Shape, Tensor, D};
use std::array;

/// RMS norm of `x` (.., n) with the gain `w` (n).
pub(crate) fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    check_shape(x, w)?;
    if constant(x, &[w]) {
        return candle_nn::ops::rms_norm(&x.contiguous()?, &w.contiguous()?, eps);
    }
    run(NormOp { eps, remove_mean: false }, [x, w])
}

/// Layer norm of `x` (.., n) with the gain `w` (n) and the bias `b` (n), if any.
pub(crate) fn layer_norm(x: &Tensor, w: &Tensor, b: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    let op = NormOp { eps, remove_mean: true };
    check_shape(x, w)?;
    let Some(b) = b else { return run(op, [x, w]) };
    check_shape(x, b)?;
    if constant(x, &[w, b]) {
        let (x, w, b) = (x.contiguous()?, w.contiguous()?, b.contiguous()?);
        return candle_nn::ops::layer_norm(&x, &w, &b, eps);
    }
    run(op, [x, w, b])
}

/// Whether candle's kernels compute it: without a gradient, and for operands of one dtype other than F64.
fn constant(x: &Tensor, others: &[&Tensor]) -> bool {
    let fits = |t: &Tensor| !t.track_op() && t.dtype() == x.dtype();
    x.dtype() != DType::F64 && x.elem_count() > 0 && fits(x) && others.iter().all(|t| fits(t))
}

fn check_shape(x: &Tensor, w: &Tensor) -> Result<()> {
    if x.dims().last().is_none_or(|n| w.dims() != [*n]) {
        bail!("norm: the input is {:?} and the gain or bias {:?}", x.dims(), w.dims())
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct NormOp {
    eps: f32,
    remove_mean: bool,
}

impl NormOp {
    /// A row's mean (0 for RMS norm) and s.
    #[inline(always)]
    fn moments(self, x: &[f32]) -> (f32, f32) {
        let share = 1. / x.len() as f32;
        let mean = if self.remove_mean { sum(x, x, |x, _| x) * share } else { 0. };
        let variance = sum(x, x, |x, _| (x - mean) * (x - mean)) * share;
        (mean, 1. / (variance + self.eps).sqrt())
    }

    fn grad_x(self, x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<Tensor> {
        map_tensor_rows(
            [x, grad, w],
            #[inline(always)]
            |_, [x, g, w], gx| {
                let ((mean, s), share) = (self.moments(x), 1. / x.len() as f32);
                gx.iter_mut().zip(g).zip(w).for_each(|((h, g), w)| *h = g * w);
                let h_mean = if self.remove_mean { sum(gx, gx, |h, _| h) * share } else { 0. };
                let along = sum(x, gx, |x, h| h * (x - mean)) * s * s * share;
                for (h, x) in gx.iter_mut().zip(x) {
                    *h = (*h - h_mean - along * (x - mean)) * s;
                }
            },
        )
    }

    fn grad_w(self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let product = map_tensor_rows(
            [x, grad],
            #[inline(always)]
            |_, [x, g], y| {
                let (mean, s) = self.moments(x);
                y.iter_mut().zip(x).zip(g).for_each(|((y, x), g)| *y = g * (x - mean) * s);
            },
        )?;
        sum_rows(&product)
    }
}

/// The sum of all rows, as a product with ones.
fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let n = x.dim(D::Minus1)?;
    let x = x.reshape(((), n))?;
    matmul(&Tensor::ones((1, x.dim(0)?), x.dtype(), x.device())?, &x)?.reshape(n)
}

/// The arguments are x, w and, for a bias, b.
impl<const N: usize> Fused<N> for NormOp {
    const NAME: &'static str = "norm";

    fn forward(&self, args: [Operand; N]) -> Result<(CpuStorage, Shape)> {
        match args[..] {
            [x, w] => map_rows(
                [x, w],
                #[inline(always)]
                |_, [x, w], y| {
                    let (mean, s) = self.moments(x);
                    y.iter_mut().zip(x).zip(w).for_each(|((y, x), w)| *y = (x - mean) * s * w);
                },
            ),
            [x, w, b] => map_rows(
                [x, w, b],
                #[inline(always)]
                |_, [x, w, b], y| {
                    let (mean, s) = self.moments(x);
                    for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                        *y = (x - mean) * s * w + b;
                    }
                },
            ),
            _ => bail!("norm: {N} arguments"),
        }
    }

    fn backward(&self, args: [&Tensor; N], _: &Tensor, grad: &Tensor) -> Result<Grads<N>> {
        let (x, w, grad) = (args[0], args[1], grad.contiguous()?);
        let gx = if_tracked(x, || self.grad_x(x, w, &grad))?;
        let gw = if_tracked(w, || self.grad_w(x, &grad))?;
        let gb = args.get(2).map(|b| if_tracked(b, || sum_rows(&grad))).transpose()?.flatten();
        let mut grads = [gx, gw, gb];
        Ok(array::from_fn(|i| grads[i].take()))
    }

    /// In the compute dtype.
    fn composed(&self, args: [&Tensor; N]) -> Result<Tensor> {
        let (x, w) = (args[0], args[1]);
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let dtype = x.dtype();
        let mut x = x.to_dtype(compute_dtype(dtype))?;
        if self.remove_mean {
            x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        }
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(variance + f64::from(self.eps))?.sqrt()?)?.to_dtype(dtype)?;
        let w = w.to_dtype(dtype)?;
        let y = if w.track_op() { x.broadcast_mul(&w)? } else { mul_frozen(&x, &w)? };
        plus_bias(y, args.get(2).map(|b| b.to_dtype(dtype)).transpose()?.as_ref())
    }
}
