//! Attention as one node: heads, scores, mask, softmax and their gradients.

use crate::computed::computed3;
use crate::rows::{by_rows, sum};
use candle_core::{Result, Tensor, D};

/// Multi-head attention of `q`, `k`, `v` (batch, tokens, n). `mask`, which is added to the scores
/// (batch, heads, tokens, tokens), broadcasts to them.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    heads: usize,
) -> Result<Tensor> {
    let scale = (heads as f64 / q.dim(D::Minus1)? as f64).sqrt();
    let [q_, k_, v_] = [q, k, v].map(|x| split(&x.detach(), heads));
    let (q_, k_, v_) = ((q_? * scale)?, k_?, v_?);
    let scores = q_.matmul(&k_.t()?)?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    let p = candle_nn::ops::softmax_last_dim(&scores)?;
    computed3([q, k, v], joined(&p.matmul(&v_)?)?, move |grad| {
        let grad = split(grad, heads)?;
        let gs = softmax_grad(&p, &grad.matmul(&v_.t()?)?)?;
        Ok([
            joined(&(gs.matmul(&k_)? * scale)?)?,
            joined(&gs.t()?.matmul(&q_)?)?,
            joined(&p.t()?.matmul(&grad)?)?,
        ])
    })
}

/// (batch, tokens, n) to (batch, heads, tokens, n / heads).
fn split(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, n) = x.dims3()?;
    x.reshape((batch, tokens, heads, n / heads))?.transpose(1, 2)?.contiguous()
}

/// The way back.
fn joined(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.flatten_from(2)
}

/// The gradient towards the argument of a softmax, from its value and the gradient there.
pub fn softmax_grad(p: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let fused = by_rows(
        [p, grad],
        #[inline(always)]
        |[p, g], y| {
            let along = sum(p, g, |p, g| p * g);
            y.iter_mut().zip(p).zip(g).for_each(|((y, p), g)| *y = p * (g - along));
        },
    )?;
    match fused {
        Some(grad) => Ok(grad),
        None => {
            let g = (grad * p)?;
            &g - p.broadcast_mul(&g.sum_keepdim(D::Minus1)?)?
        }
    }
}
