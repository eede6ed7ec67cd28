//! Layer norm and RMS norm over the last dimension: `y = x̂ ∘ w + b` with `x̂ = (x - mean)·s` and
//! `s = 1/√(mean((x - mean)²) + eps)`; RMS norm has no mean and no b.
//!
//! Backward, with `h = g ∘ w`: `gx = s·(h - mean(h) - x̂·mean(h ∘ x̂))`, `gw = Σ g ∘ x̂` and `gb = Σ g`
//! over the rows. A frozen gain or bias costs no gradient.

use super::cpu::{map_rows, map_tensor_rows, sum};
use super::linear::matmul::matmul;
use super::op::{compute_dtype, if_tracked, operand, run, Fused, Grads, Operand};
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
pub(super) fn sum_rows(x: &Tensor) -> Result<Tensor> {
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
        let (x, w) = (operand(args[0], DType::F32)?, operand(args[1], DType::F32)?);
        let grad_x = || self.grad_x(&x, &w, grad);
        grads_of(args, grad, grad_x, || self.grad_w(&x, grad))
    }

    fn composed(&self, args: [&Tensor; N]) -> Result<Tensor> {
        let (x, others) = (args[0], &args[1..]);
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let others = others.iter().map(|t| operand(t, x.dtype())).collect::<Result<Vec<_>>>()?;
        match &others[..] {
            [w] if x.dtype() != DType::F64 && !self.remove_mean => {
                candle_nn::ops::rms_norm(&x.contiguous()?, w, self.eps)
            }
            [w, b] if x.dtype() != DType::F64 => {
                candle_nn::ops::layer_norm(&x.contiguous()?, w, b, self.eps)
            }
            [w, b @ ..] => {
                let y = self.normalized(x)?.0.to_dtype(x.dtype())?.broadcast_mul(w)?;
                b.iter().try_fold(y, |y, b| y.broadcast_add(b))
            }
            [] => bail!("norm: {N} arguments"),
        }
    }

    fn composed_backward(&self, args: [&Tensor; N], _: &Tensor, g: &Tensor) -> Result<Grads<N>> {
        let (y, s) = self.normalized(&args[0].detach())?;
        let g = g.to_dtype(y.dtype())?;
        let grad_x = || {
            let h = g.broadcast_mul(&operand(args[1], y.dtype())?)?;
            let along = (&h * &y)?.mean_keepdim(D::Minus1)?;
            let across = (&h - y.broadcast_mul(&along)?)?;
            let across = match self.remove_mean {
                true => across.broadcast_sub(&h.mean_keepdim(D::Minus1)?)?,
                false => across,
            };
            across.broadcast_mul(&s)
        };
        grads_of(args, &g, grad_x, || sum_rows(&(&g * &y)?))
    }
}

impl NormOp {
    /// x̂ and s, in the compute dtype.
    fn normalized(self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut x = x.to_dtype(compute_dtype(x.dtype()))?;
        if self.remove_mean {
            x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        }
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        let s = (variance + f64::from(self.eps))?.sqrt()?.recip()?;
        Ok((x.broadcast_mul(&s)?, s))
    }
}

/// The gradients of x, w and, if there is one, b.
fn grads_of<const N: usize>(
    args: [&Tensor; N],
    grad: &Tensor,
    grad_x: impl FnOnce() -> Result<Tensor>,
    grad_w: impl FnOnce() -> Result<Tensor>,
) -> Result<Grads<N>> {
    let (gx, gw) = (if_tracked(args[0], grad_x)?, if_tracked(args[1], grad_w)?);
    let gb = args.get(2).map(|b| if_tracked(b, || sum_rows(grad))).transpose()?.flatten();
    let mut grads = [gx, gw, gb];
    Ok(array::from_fn(|i| grads[i].take()))
}
