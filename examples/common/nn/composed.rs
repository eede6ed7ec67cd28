//! Attention of candle's operations, on any device and in any dtype.

use super::heads::Heads;
use candle_core::{Result, Tensor, D};

/// The output, and the probabilities behind it (batch, heads, tokens, tokens).
pub fn forward(
    [q, k, v]: &[Tensor; 3],
    mask: Option<&Tensor>,
    heads: &Heads,
) -> Result<(Tensor, Tensor)> {
    let split = |x| split(x, heads);
    let scores = (split(q)? * heads.scale)?.matmul(&split(k)?.t()?)?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    let p = candle_nn::ops::softmax_last_dim(&scores)?;
    Ok((joined(&p.matmul(&split(v)?)?)?, p))
}

/// The gradients towards q, k and v.
pub fn backward(
    [q, k, v]: &[Tensor; 3],
    p: &Tensor,
    grad: &Tensor,
    heads: &Heads,
) -> Result<[Tensor; 3]> {
    let split = |x| split(x, heads);
    let grad = split(grad)?;
    let gp = (grad.matmul(&split(v)?.t()?)? * p)?;
    let gs = ((&gp - p.broadcast_mul(&gp.sum_keepdim(D::Minus1)?)?)? * heads.scale)?;
    Ok([
        joined(&gs.matmul(&split(k)?)?)?,
        joined(&gs.t()?.matmul(&split(q)?)?)?,
        joined(&p.t()?.matmul(&grad)?)?,
    ])
}

/// (batch, tokens, n) to (batch, heads, tokens, n / heads).
fn split(x: &Tensor, heads: &Heads) -> Result<Tensor> {
    x.reshape((heads.batch, heads.tokens, heads.count, heads.n / heads.count))?
        .transpose(1, 2)?
        .contiguous()
}

/// The way back.
fn joined(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.flatten_from(2)
}
