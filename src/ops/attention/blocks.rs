//! Attention composed of candle's operations, in blocks of queries: the arrays of one block are in memory, and its key
//! heads are not repeated.

use super::scores::Scores;
use crate::ops::cpu::attention::Heads;
use crate::ops::op::compute_dtype;
use crate::ops::softmax::softmax_last_dim;
use candle_core::{Result, Tensor, D};
use std::ops::Range;

/// Scores of a block, for each head of keys and in all: up to 128 MiB in F32, of which three arrays are in memory.
const BLOCK: usize = if cfg!(test) { 1 << 6 } else { 3 << 20 };
const BLOCK_IN_ALL: usize = if cfg!(test) { 1 << 8 } else { 1 << 25 };

/// The output (batch, queries, heads, d).
pub(super) fn forward(heads: &Heads, scores: &Scores, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let all = Attention::new(heads, scores, q, k)?;
    let v = by_head(v)?.contiguous()?;
    let mut y = None;
    for block in all.blocks() {
        let p = heads.by_key_head(&all.probabilities(&block)?.0.to_dtype(v.dtype())?)?;
        let part = heads.by_query_head(&p.matmul(&block.of_keys(&v)?)?)?;
        if block.queries.len() == heads.queries {
            return by_head(&part);
        }
        let y = match &mut y {
            Some(y) => y,
            None => y.insert(by_head(q)?.zeros_like()?),
        };
        set(y, part, block.queries.start)?;
    }
    by_head(&y.map_or_else(|| by_head(q)?.zeros_like(), Ok)?)
}

/// The output from all scores at once, with a graph that leads to the mask too.
pub(super) fn whole(heads: &Heads, scores: &Scores, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let all = Attention::new(heads, scores, q, k)?;
    let block = Block { queries: 0..heads.queries, keys: 0..heads.keys };
    let v = by_head(v)?.contiguous()?;
    let p = heads.by_key_head(&all.probabilities(&block)?.0.to_dtype(v.dtype())?)?;
    by_head(&heads.by_query_head(&p.matmul(&v)?)?)
}

/// The gradients of q, k and v, from the output's gradient. As in the forward, scores are in F32 for half precision, and the
/// operands of other products are rounded.
pub(super) fn backward(
    heads: &Heads,
    scores: &Scores,
    [q, k, v]: [&Tensor; 3],
    g: &Tensor,
) -> Result<[Tensor; 3]> {
    let all = Attention::new(heads, scores, q, k)?;
    let (half, dtype) = (q.dtype(), all.k.dtype());
    let (g, rounded_k) = (by_head(g)?, by_head(k)?.contiguous()?);
    let v = by_head(v)?.to_dtype(dtype)?.contiguous()?;
    let mut gq = all.q.zeros_like()?;
    let [mut gk, mut gv] = [all.k.zeros_like()?, v.zeros_like()?];
    for block in all.blocks() {
        let (p, capped) = all.probabilities(&block)?;
        let (q, g) = (block.of_queries(&all.q)?, block.of_queries(&g)?);
        let (q, g) = (heads.by_key_head(&q)?, heads.by_key_head(&g)?);
        let part = heads.by_key_head(&p.to_dtype(half)?)?.t()?.matmul(&g)?;
        block.add_to_keys(&mut gv, part)?;
        // Each array is dropped as soon as the next one is there.
        let mut gs = g.to_dtype(dtype)?.matmul(&block.of_keys(&v)?.t()?)?.reshape(p.shape())?;
        let dots = (&p * &gs)?.sum_keepdim(D::Minus1)?;
        gs = gs.broadcast_sub(&dots)?;
        gs = (p * gs)?;
        if let Some(capped) = capped {
            gs = (gs * capped.sqr()?.affine(-1., 1.)?)?;
        }
        gs = heads.by_key_head(&(gs * scores.scale)?.to_dtype(half)?)?;
        block.add_to_keys(&mut gk, gs.t()?.matmul(&q)?)?;
        let part = heads.by_query_head(&gs.matmul(&block.of_keys(&rounded_k)?)?)?;
        set(&mut gq, part, block.queries.start)?;
    }
    Ok([by_head(&gq)?, by_head(&gk)?, by_head(&gv)?])
}

/// The scores of all queries, of which a block's are computed at a time, in F32 for half precision: rounded to it they
/// would lose their digits, or overflow.
struct Attention<'a> {
    heads: &'a Heads,
    scores: &'a Scores,
    /// (batch, heads, queries, d)
    q: Tensor,
    /// (batch, kv_heads, keys, d), in the compute dtype.
    k: Tensor,
    /// Each query's position among the keys, (queries, 1), and each key's (keys).
    positions: [Tensor; 2],
    /// The score of a key that is not seen.
    hidden: Tensor,
}

/// Some queries, and the keys that some of them see.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl<'a> Attention<'a> {
    fn new(heads: &'a Heads, scores: &'a Scores, q: &Tensor, k: &Tensor) -> Result<Self> {
        let device = q.device();
        let numbers = |from: i64, len: usize| {
            let numbers =
                (0..len as i64).map(|i| from.saturating_add(i) as f32).collect::<Vec<_>>();
            Tensor::from_vec(numbers, len, device)
        };
        let of_queries = numbers(scores.window.position(0), heads.queries)?;
        let positions = [of_queries.unsqueeze(1)?, numbers(0, heads.keys)?];
        let hidden = Tensor::new(f32::NEG_INFINITY, device)?.to_dtype(compute_dtype(q.dtype()))?;
        let (q, k) = (by_head(q)?, by_head(k)?.to_dtype(hidden.dtype())?.contiguous()?);
        Ok(Self { heads, scores, q, k, positions, hidden })
    }

    /// The queries that see a key, in blocks.
    fn blocks(&self) -> impl Iterator<Item = Block> {
        let Heads { batch, queries, keys, count, kv_count, .. } = *self.heads;
        let (window, width) = (self.scores.window, self.scores.window.width(keys));
        let scores = BLOCK.saturating_mul(batch * kv_count).min(BLOCK_IN_ALL);
        let step = scores / (batch * count * width).max(1);
        // A block's window is as wide as a query's and the block together.
        let most = if width < keys { width.max(64) } else { queries };
        let step = step.clamp(1, most.max(1));
        let Range { start, end } = window.seeing(queries, keys);
        (start..end).step_by(step).map(move |from| {
            let queries = from..(from + step).min(end);
            Block { keys: window.keys_of(&queries, keys), queries }
        })
    }

    /// The probabilities (batch, heads, queries, keys) of a block in the compute dtype, and tanh(s/cap) with a softcap.
    fn probabilities(&self, block: &Block) -> Result<(Tensor, Option<Tensor>)> {
        let Scores { softcap, window, slopes, mask, .. } = self.scores;
        let Heads { batch, count, queries, keys, .. } = *self.heads;
        let q = block.of_queries(&self.q)?.to_dtype(self.hidden.dtype())?;
        let q = self.heads.by_key_head(&(q * self.scores.scale)?)?;
        let mut s = q.matmul(&block.of_keys(&self.k)?.t()?)?;
        s = s.reshape((batch, count, block.queries.len(), block.keys.len()))?;
        let mut capped = None;
        if let Some(cap) = softcap {
            let tanh = (s / *cap)?.tanh()?;
            s = (&tanh * *cap)?;
            capped = Some(tanh);
        }
        if let Some(mask) = mask {
            let mask = mask.broadcast_as((batch, count, queries, keys))?;
            let mask = mask.narrow(2, block.queries.start, block.queries.len())?;
            let mask = mask.narrow(3, block.keys.start, block.keys.len())?;
            s = (s + mask.to_dtype(self.hidden.dtype())?)?;
        }
        let [positions, numbers] = &self.positions;
        let positions = positions.narrow(0, block.queries.start, block.queries.len())?;
        let numbers = numbers.narrow(0, block.keys.start, block.keys.len())?;
        if let Some(slopes) = slopes {
            let distances = numbers.broadcast_sub(&positions)?.abs()?.to_dtype(s.dtype())?;
            let slopes = slopes.detach().to_dtype(s.dtype())?.reshape((count, 1, 1))?;
            s = s.broadcast_sub(&distances.broadcast_mul(&slopes)?)?;
        }
        if !window.is_full(&block.queries, keys) {
            let right =
                window.right.map(|right| numbers.broadcast_le(&(&positions + right as f64)?));
            let left = window.left.map(|left| numbers.broadcast_ge(&(&positions - left as f64)?));
            for seen in [right, left].into_iter().flatten() {
                let hidden = self.hidden.broadcast_as(s.shape())?;
                s = seen?.broadcast_as(s.shape())?.where_cond(&s, &hidden)?;
            }
        }
        Ok((softmax_last_dim(&s)?, capped))
    }
}

impl Block {
    /// `t` (batch, kv_heads, keys, d) of this block's keys.
    fn of_keys(&self, t: &Tensor) -> Result<Tensor> {
        t.narrow(2, self.keys.start, self.keys.len())
    }

    /// `t` (batch, heads, queries, d) of this block's queries.
    fn of_queries(&self, t: &Tensor) -> Result<Tensor> {
        t.narrow(2, self.queries.start, self.queries.len())?.contiguous()
    }

    /// Adds to the rows of `sums` that are this block's keys.
    fn add_to_keys(&self, sums: &mut Tensor, part: Tensor) -> Result<()> {
        let sum = (self.of_keys(sums)? + part.to_dtype(sums.dtype())?)?;
        set(sums, sum, self.keys.start)
    }
}

/// Replaces rows of `t` from `start` on.
fn set(t: &mut Tensor, rows: Tensor, start: usize) -> Result<()> {
    match rows.dims() == t.dims() {
        true => *t = rows,
        false => t.slice_set(&rows.contiguous()?, 2, start)?,
    }
    Ok(())
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
