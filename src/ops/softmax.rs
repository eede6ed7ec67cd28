//! Softmax over the last dimension, with a backward: `gx = y ∘ (g - Σ y∘g)`.

use super::backend::Backend;
use super::cpu::{exp_nonpositive, map_rows, max, sum};
use super::fused::fused_or_composed;
use super::op::{if_tracked, Custom, Op};
use candle_core::{Layout, Result, Shape, Tensor, D};

/// (.., n) to (.., n), each row summing to 1.
pub(crate) fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    if !x.track_op() {
        return candle_nn::ops::softmax_last_dim(x);
    }
    fused_or_composed(
        x,
        |x| x.apply_op1(Custom(SoftmaxOp)),
        |x| candle_nn::ops::softmax(x, D::Minus1),
    )
}

struct SoftmaxOp;

impl Op<1> for SoftmaxOp {
    const NAME: &'static str = "softmax";

    fn forward<S: Backend>(&self, [(x, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        let y = S::map_rows(
            [(x, l)],
            #[inline(always)]
            |_, [x], y| {
                let max = max(x);
                y.iter_mut().zip(x).for_each(|(y, x)| *y = exp_nonpositive(x - max));
                let scale = 1. / sum(y, y, |y, _| y);
                y.iter_mut().for_each(|y| *y *= scale);
            },
        )?;
        Ok((y, l.shape().clone()))
    }

    fn backward(&self, [x]: [&Tensor; 1], y: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let gx = || {
            map_rows(
                [y, &g.contiguous()?],
                #[inline(always)]
                |_, [y, g], gx| {
                    let dot = sum(y, g, |y, g| y * g);
                    gx.iter_mut().zip(y).zip(g).for_each(|((gx, y), g)| *gx = y * (g - dot));
                },
            )
        };
        Ok([if_tracked(x, gx)?])
    }
}
