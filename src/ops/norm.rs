//! Layer norm and RMS norm over the last dimension: `y = x̂ ∘ w + b` with `x̂ = (x - mean)·s` and
//! `s = 1/√(mean((x - mean)²) + eps)`; RMS norm has no mean and no b.
//!
//! Backward, with `h = g ∘ w`: `gx = s·(h - mean(h) - x̂·mean(h ∘ x̂))`, `gw = Σ g ∘ x̂` and `gb = Σ g`
//! over the rows. A frozen gain or bias costs no gradient.

use super::backend::Backend;
use super::cpu::{map_rows, sum};
use super::elementwise::{add_bias, mul_frozen};
use super::fused::fused_or_composed;
use super::low_rank::compute_dtype;
use super::matmul::matmul;
use super::op::{if_tracked, Custom, Op};
use candle_core::{bail, DType, Layout, Result, Shape, Tensor, D};

/// RMS norm of `x` (.., n) with the gain `w` (n).
pub(crate) fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    let op = NormOp { eps, remove_mean: false };
    check_shape(x, w)?;
    if constant(x, &[w]) {
        return candle_nn::ops::rms_norm(&x.contiguous()?, &w.contiguous()?, eps);
    }
    let fused = |x: &Tensor| x.apply_op2(&w.to_dtype(x.dtype())?.contiguous()?, Custom(op));
    fused_or_composed(x, fused, |x| op.composed(x, w, None))
}

/// Layer norm of `x` (.., n) with the gain `w` (n) and the bias `b` (n), if any.
pub(crate) fn layer_norm(x: &Tensor, w: &Tensor, b: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    let op = NormOp { eps, remove_mean: true };
    check_shape(x, w)?;
    let Some(b) = b else {
        let fused = |x: &Tensor| x.apply_op2(&w.to_dtype(x.dtype())?.contiguous()?, Custom(op));
        return fused_or_composed(x, fused, |x| op.composed(x, w, None));
    };
    check_shape(x, b)?;
    if constant(x, &[w, b]) {
        return candle_nn::ops::layer_norm(
            &x.contiguous()?,
            &w.contiguous()?,
            &b.contiguous()?,
            eps,
        );
    }
    let fused = |x: &Tensor| {
        let own = |t: &Tensor| t.to_dtype(x.dtype())?.contiguous();
        x.apply_op3(&own(w)?, &own(b)?, Custom(op))
    };
    fused_or_composed(x, fused, |x| op.composed(x, w, Some(b)))
}

/// Whether candle's kernels do: without a gradient, and for operands of one dtype other than F64.
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
        map_rows(
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
        let product = map_rows(
            [x, grad],
            #[inline(always)]
            |_, [x, g], y| {
                let (mean, s) = self.moments(x);
                y.iter_mut().zip(x).zip(g).for_each(|((y, x), g)| *y = g * (x - mean) * s);
            },
        )?;
        sum_rows(&product)
    }

    /// The same of candle's operations, in the compute dtype.
    fn composed(self, x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
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
        match b {
            None => Ok(y),
            Some(b) => add_bias(&y, &b.to_dtype(dtype)?, y.rank() - 1),
        }
    }
}

/// The sum of all rows, as a product with ones.
fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let n = x.dim(D::Minus1)?;
    let x = x.reshape(((), n))?;
    matmul(&Tensor::ones((1, x.dim(0)?), x.dtype(), x.device())?, &x)?.reshape(n)
}

impl Op<2> for NormOp {
    const NAME: &'static str = "norm";

    fn forward<S: Backend>(&self, [(x, l), w]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        let y = S::map_rows(
            [(x, l), w],
            #[inline(always)]
            |_, [x, w], y| {
                let (mean, s) = self.moments(x);
                y.iter_mut().zip(x).zip(w).for_each(|((y, x), w)| *y = (x - mean) * s * w);
            },
        )?;
        Ok((y, l.shape().clone()))
    }

    fn backward(
        &self,
        [x, w]: [&Tensor; 2],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let grad = grad.contiguous()?;
        let gx = if_tracked(x, || self.grad_x(x, w, &grad))?;
        Ok([gx, if_tracked(w, || self.grad_w(x, &grad))?])
    }
}

impl Op<3> for NormOp {
    const NAME: &'static str = "norm-bias";

    fn forward<S: Backend>(&self, [(x, l), w, b]: [(&S, &Layout); 3]) -> Result<(S, Shape)> {
        let y = S::map_rows(
            [(x, l), w, b],
            #[inline(always)]
            |_, [x, w, b], y| {
                let (mean, s) = self.moments(x);
                for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                    *y = (x - mean) * s * w + b;
                }
            },
        )?;
        Ok((y, l.shape().clone()))
    }

    fn backward(
        &self,
        [x, w, b]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = grad.contiguous()?;
        let gx = if_tracked(x, || self.grad_x(x, w, &grad))?;
        let gw = if_tracked(w, || self.grad_w(x, &grad))?;
        Ok([gx, gw, if_tracked(b, || sum_rows(&grad))?])
    }
}
