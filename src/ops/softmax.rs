//! Softmax over the last dimension, with a backward: `gx = y ∘ (g - Σ y∘g)`.

use super::cpu::{exp_nonpositive, map_rows, map_tensor_rows, max, sum};
use super::op::{compute_dtype, if_tracked, operand, run, Fused, Grads, Operand};
use candle_core::{bail, CpuStorage, DType, Result, Shape, Tensor, D};

/// (.., n) to (.., n), each row summing to 1.
pub(crate) fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    if x.rank() == 0 {
        bail!("softmax_last_dim: the input is a scalar, expected (.., n)")
    }
    if !x.track_op() && x.elem_count() > 0 {
        return candle_nn::ops::softmax_last_dim(x);
    }
    run(SoftmaxOp, [x])
}

/// The gradient of the scores from that of the probabilities `y`.
fn softmax_grad(y: &Tensor, g: &Tensor) -> Result<Tensor> {
    y * g.broadcast_sub(&(y * g)?.sum_keepdim(D::Minus1)?)?
}

struct SoftmaxOp;

impl Fused<1> for SoftmaxOp {
    const NAME: &'static str = "softmax";

    fn forward(&self, x: [Operand; 1]) -> Result<(CpuStorage, Shape)> {
        map_rows(
            x,
            #[inline(always)]
            |_, [x], y| {
                let max = max(x);
                y.iter_mut().zip(x).for_each(|(y, x)| *y = exp_nonpositive(x - max));
                let scale = 1. / sum(y, y, |y, _| y);
                y.iter_mut().for_each(|y| *y *= scale);
            },
        )
    }

    fn backward(&self, [x]: [&Tensor; 1], y: &Tensor, g: &Tensor) -> Result<Grads<1>> {
        let gx = || {
            map_tensor_rows(
                [&operand(y, DType::F32)?, g],
                #[inline(always)]
                |_, [y, g], gx| {
                    let dot = sum(y, g, |y, g| y * g);
                    gx.iter_mut().zip(y).zip(g).for_each(|((gx, y), g)| *gx = y * (g - dot));
                },
            )
        };
        Ok([if_tracked(x, gx)?])
    }

    fn composed(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        candle_nn::ops::softmax_last_dim(&x.contiguous()?)
    }

    fn composed_backward(&self, [x]: [&Tensor; 1], y: &Tensor, g: &Tensor) -> Result<Grads<1>> {
        let dtype = compute_dtype(y.dtype());
        Ok([if_tracked(x, || softmax_grad(&y.to_dtype(dtype)?, &g.to_dtype(dtype)?))?])
    }
}
