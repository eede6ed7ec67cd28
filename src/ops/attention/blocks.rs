//! Attention composed of candle's operations, in blocks of queries: the arrays of one block are in memory, and its key
//! heads are not repeated.

use super::scores::Scores;
use crate::ops::cpu::attention::Heads;
use crate::ops::op::compute_dtype;
use crate::ops::softmax::softmax_grad;
use candle_core::{Result, Tensor, D};
use std::ops::Range;

/// Scores of a block, for each head of keys and in all: up to 128 MiB in F32, of which a few arrays are in memory.
const BLOCK: usize = if cfg!(test) { 1 << 6 } else { 1 << 21 };
const BLOCK_IN_ALL: usize = if cfg!(test) { 1 << 8 } else { 1 << 25 };

/// The queries of each block: those that see a key.
fn blocks(heads: &Heads, scores: &Scores) -> impl Iterator<Item = Range<usize>> {
    let Heads { batch, queries, keys, count, kv_count, .. } = *heads;
    let (window, width) = (scores.window, scores.window.width(keys));
    let scores = BLOCK.saturating_mul(batch * kv_count).min(BLOCK_IN_ALL);
    let step = scores / (batch * count * width).max(1);
    // A block's window is as wide as a query's and the block together.
    let most = if width < keys { width.max(64) } else { queries };
    let step = step.clamp(1, most.max(1));
    let Range { start, end } = window.seeing(queries, keys);
    (start..end).step_by(step).map(move |from| from..(from + step).min(end))
}

/// The output (batch, queries, heads, d).
pub(super) fn forward(heads: &Heads, scores: &Scores, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let [k, v] = [by_head(k)?.contiguous()?, by_head(v)?.contiguous()?];
    let y = by_head(q)?.zeros_like()?;
    for queries in blocks(heads, scores) {
        let block = Block::new(heads, scores, queries, q, &k)?;
        let part = heads.by_key_head(&block.p.to_dtype(v.dtype())?)?.matmul(&block.of_keys(&v)?)?;
        let part = heads.by_query_head(&part)?;
        if part.dims() == y.dims() {
            return by_head(&part);
        }
        y.slice_set(&part, 2, block.queries.start)?;
    }
    by_head(&y)
}

/// The gradients of q, k and v, from the output's gradient.
pub(super) fn backward(
    heads: &Heads,
    scores: &Scores,
    qkv: [&Tensor; 3],
    g: &Tensor,
) -> Result<[Tensor; 3]> {
    let [q, k, v] = qkv;
    let [k, v] = [by_head(k)?.contiguous()?, by_head(v)?.contiguous()?];
    let sums = |t: &Tensor| Tensor::zeros(t.shape(), compute_dtype(t.dtype()), t.device());
    let (gq, gk, gv) = (by_head(q)?.zeros_like()?, sums(&k)?, sums(&v)?);
    for queries in blocks(heads, scores) {
        let block = Block::new(heads, scores, queries, q, &k)?;
        let g = heads.by_key_head(&block.of_queries(g)?)?;
        let p = heads.by_key_head(&block.p.to_dtype(g.dtype())?)?;
        block.add_to(&gv, p.t()?.matmul(&g)?)?;
        let gp = g.matmul(&block.of_keys(&v)?.t()?)?.to_dtype(block.p.dtype())?;
        let mut gs = softmax_grad(&block.p, &gp.reshape(block.p.shape())?)?;
        if let Some(capped) = &block.capped {
            gs = (gs * capped.sqr()?.affine(-1., 1.)?)?;
        }
        let gs = heads.by_key_head(&gs.to_dtype(g.dtype())?)?;
        block.add_to(&gk, gs.t()?.matmul(&heads.by_key_head(&block.q)?)?)?;
        let part = (gs.matmul(&block.of_keys(&k)?)? * scores.scale)?;
        gq.slice_set(&heads.by_query_head(&part)?, 2, block.queries.start)?;
    }
    Ok([by_head(&gq)?, by_head(&gk)?, by_head(&gv)?])
}

/// Some queries of all heads.
struct Block {
    queries: Range<usize>,
    /// The keys that some of the queries see.
    keys: Range<usize>,
    /// Times the scale, (batch, heads, queries, d).
    q: Tensor,
    /// (batch, heads, queries, keys), in the compute dtype.
    p: Tensor,
    /// With a softcap, tanh(s/cap).
    capped: Option<Tensor>,
}

impl Block {
    /// `k` is (batch, kv_heads, keys, d).
    fn new(
        sizes: &Heads,
        scores: &Scores,
        queries: Range<usize>,
        q: &Tensor,
        k: &Tensor,
    ) -> Result<Self> {
        let Scores { scale, softcap, window, mask, .. } = scores;
        let Heads { batch, count, queries: all_queries, keys: all_keys, .. } = *sizes;
        let keys = window.keys_of(&queries, all_keys);
        let narrow = |t: &Tensor| t.narrow(2, queries.start, queries.len());
        let q = (narrow(&by_head(q)?)?.contiguous()? * *scale)?;
        let kt = k.narrow(2, keys.start, keys.len())?.t()?;
        let s = sizes.by_key_head(&q)?.matmul(&kt)?.to_dtype(compute_dtype(q.dtype()))?;
        let mut s = s.reshape((batch, count, queries.len(), keys.len()))?;
        let mut capped = None;
        if let Some(cap) = softcap {
            let tanh = (s / *cap)?.tanh()?;
            s = (&tanh * *cap)?;
            capped = Some(tanh);
        }
        if let Some(mask) = mask {
            let mask = mask.detach().broadcast_as((batch, count, all_queries, all_keys))?;
            let mask = narrow(&mask)?.narrow(3, keys.start, keys.len())?;
            s = (s + mask.to_dtype(q.dtype())?.to_dtype(compute_dtype(q.dtype()))?)?;
        }
        if let Some(bias) = bias(scores, queries.clone(), keys.clone(), all_keys, &q)? {
            s = s.broadcast_add(&bias)?;
        }
        let p = candle_nn::ops::softmax_last_dim(&s)?;
        Ok(Self { queries, keys, q, p, capped })
    }

    /// `t` (batch, kv_heads, keys, d) of this block's keys.
    fn of_keys(&self, t: &Tensor) -> Result<Tensor> {
        t.narrow(2, self.keys.start, self.keys.len())
    }

    /// `t` (batch, queries, heads, d) of this block's queries, by head.
    fn of_queries(&self, t: &Tensor) -> Result<Tensor> {
        by_head(t)?.narrow(2, self.queries.start, self.queries.len())?.contiguous()
    }

    /// Adds to the rows of `sums` that are this block's keys.
    fn add_to(&self, sums: &Tensor, part: Tensor) -> Result<()> {
        let sum = (self.of_keys(sums)? + part.to_dtype(sums.dtype())?)?;
        sums.slice_set(&sum, 2, self.keys.start)
    }
}

impl Heads {
    /// (batch, heads, n, m) to (batch, kv_heads, n of each head, m): the heads that share keys are rows of one matrix.
    fn by_key_head(&self, t: &Tensor) -> Result<Tensor> {
        t.reshape((self.batch, self.kv_count, (), t.dim(D::Minus1)?))
    }

    /// The reverse.
    fn by_query_head(&self, t: &Tensor) -> Result<Tensor> {
        t.reshape((self.batch, self.count, (), t.dim(D::Minus1)?))
    }
}

/// (batch, tokens, heads, d) to (batch, heads, tokens, d), and back.
fn by_head(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)
}

/// What is added to the scores of some queries and keys beside a mask: -∞ outside of the window, and ALiBi's share.
/// Broadcasts to (batch, heads, queries, keys), and is in the compute dtype beside `x`.
pub(super) fn bias(
    scores: &Scores,
    queries: Range<usize>,
    keys: Range<usize>,
    all_keys: usize,
    x: &Tensor,
) -> Result<Option<Tensor>> {
    let (window, device, dtype) = (scores.window, x.device(), compute_dtype(x.dtype()));
    let full = window.is_full(&queries, all_keys);
    if full && scores.slopes.is_none() {
        return Ok(None);
    }
    // The distance of each key from each query's position, (queries, keys).
    let first = window.position(queries.start) - keys.start as i64;
    let positions = Tensor::arange(first, first + queries.len() as i64, device)?.unsqueeze(1)?;
    let apart = Tensor::arange(0, keys.len() as i64, device)?.broadcast_sub(&positions)?;
    let mut bias = match &scores.slopes {
        None => Tensor::zeros(apart.shape(), dtype, device)?,
        Some(slopes) => {
            let slopes = slopes.detach().to_dtype(dtype)?.neg()?;
            apart.to_dtype(dtype)?.abs()?.broadcast_mul(&slopes.reshape(((), 1, 1))?)?
        }
    };
    if !full {
        let hidden = Tensor::new(f32::NEG_INFINITY, device)?.to_dtype(dtype)?;
        for (bound, below) in [(window.left, true), (window.right, false)] {
            let Some(bound) = bound else { continue };
            let bound = i64::try_from(bound).unwrap_or(i64::MAX);
            let sees = if below { apart.ge(-bound)? } else { apart.le(bound)? };
            let shape = bias.shape().clone();
            bias = sees.broadcast_as(&shape)?.where_cond(&bias, &hidden.broadcast_as(&shape)?)?;
        }
    }
    Ok(Some(bias))
}
