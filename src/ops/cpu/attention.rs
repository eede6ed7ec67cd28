//! Attention in F32, in blocks of queries that threads share.

use super::buffer::{add_assign, filled};
use super::gemm::{gemm_view, View};
use super::rows::{exp_nonpositive, max, sum, vectorized};
use crate::ops::backend::Backend;
use crate::ops::window::Window;
use candle_core::{CpuStorage, Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Scores of a block: they stay in a core's second cache.
const BLOCK: usize = if cfg!(test) { 1 << 5 } else { 1 << 17 };

/// The least multiplications with keys for a block of a single query.
const WORK: usize = if cfg!(test) { 1 << 5 } else { 1 << 16 };

/// The sizes: `count` query heads of `d` values, `kv_count` heads of keys and values.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Heads {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub count: usize,
    pub kv_count: usize,
    pub d: usize,
}

impl Heads {
    /// Values of one item of q, and of k or v.
    fn lens(&self) -> (usize, usize) {
        (self.queries * self.count * self.d, self.keys * self.kv_count * self.d)
    }

    /// Some tokens of head `h` of an item of q.
    fn q(&self, h: usize, tokens: &Range<usize>) -> View {
        self.view(h, tokens, self.count)
    }

    /// Some keys or values of query head `h` in an item of k or v.
    fn kv(&self, h: usize, tokens: &Range<usize>) -> View {
        self.view(h / (self.count / self.kv_count), tokens, self.kv_count)
    }

    fn view(&self, h: usize, tokens: &Range<usize>, count: usize) -> View {
        let width = count * self.d;
        View::new(tokens.start * width + h * self.d, tokens.len(), self.d, width)
    }

    /// Some tokens of a single head.
    fn one(&self, tokens: &Range<usize>) -> View {
        View::new(tokens.start * self.d, tokens.len(), self.d, self.d)
    }

    /// Queries of a block.
    fn block(&self, window: &Window) -> usize {
        let width = window.width(self.keys).max(1);
        (BLOCK / width).max(if cfg!(test) { 2 } else { 16 }).min(self.queries.max(1))
    }

    /// Heads of a block: all of them, but of a single query some, so that all threads have a block.
    fn heads_of_block(&self, window: &Window) -> usize {
        let work = (window.width(self.keys) * self.d).max(1);
        if self.queries == 1 {
            WORK.div_ceil(work).clamp(1, self.count)
        } else {
            self.count
        }
    }
}

/// What a score is, beside q·k.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Bias<'a> {
    pub scale: f32,
    pub softcap: Option<f32>,
    pub window: Window,
    /// ALiBi's slope of each head.
    pub slopes: Option<&'a [f32]>,
    pub mask: Option<MaskRows<'a>>,
}

/// What is added to the scores: rows of keys.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct MaskRows<'a> {
    pub values: &'a [f32],
    /// The strides of batch, heads and queries.
    pub strides: [usize; 3],
    /// Whether a row has one value for all keys.
    pub same: bool,
}

/// Scores of some queries and the keys that they see, for one head at a time.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
    p: Vec<f32>,
    /// With a softcap, tanh(s/cap).
    capped: Vec<f32>,
}

impl Block {
    fn new(s: &Heads, bias: &Bias, queries: Range<usize>) -> Self {
        let keys = bias.window.keys_of(&queries, s.keys);
        let len = queries.len() * keys.len();
        let capped = if bias.softcap.is_some() { filled(0., len) } else { vec![] };
        Self { queries, keys, p: filled(0., len), capped }
    }

    fn view(&self) -> View {
        View::new(0, self.queries.len(), self.keys.len(), self.keys.len())
    }

    /// The probabilities of head `h` of item `b`.
    fn fill(&mut self, s: &Heads, bias: &Bias, (b, h): (usize, usize), [q, k]: [&[f32]; 2]) {
        if self.keys.is_empty() {
            return;
        }
        let (view, n) = (self.view(), self.keys.len());
        let (qv, kv) = (s.q(h, &self.queries), s.kv(h, &self.keys));
        gemm_view((&mut self.p, view), false, (q, qv), (k, kv.t()), bias.scale);
        vectorized(
            #[inline(always)]
            || {
                if let Some(cap) = bias.softcap {
                    for (s, t) in self.p.iter_mut().zip(&mut self.capped) {
                        *t = tanh(*s / cap);
                        *s = cap * *t;
                    }
                }
                for (i, row) in self.queries.clone().zip(self.p.chunks_exact_mut(n)) {
                    bias.add_to(row, (b, h, i), &self.keys, s.keys);
                }
                softmax(&mut self.p, n);
            },
        );
    }
}

impl Bias<'_> {
    /// Adds to the scores of query `i` and some of all keys.
    #[inline(always)]
    fn add_to(
        &self,
        row: &mut [f32],
        (b, h, i): (usize, usize, usize),
        keys: &Range<usize>,
        all: usize,
    ) {
        if let Some(MaskRows { values, strides: [of_b, of_h, of_i], same }) = self.mask {
            let mask = &values[b * of_b + h * of_h + i * of_i..];
            if same {
                row.iter_mut().for_each(|s| *s += mask[0]);
            } else {
                row.iter_mut().zip(&mask[keys.clone()]).for_each(|(s, m)| *s += m);
            }
        }
        if let Some(slopes) = self.slopes {
            let (slope, at) = (slopes[h], self.window.position(i) - keys.start as i64);
            for (j, s) in row.iter_mut().enumerate() {
                *s -= slope * (j as i64 - at).unsigned_abs() as f32;
            }
        }
        let seen = self.window.keys(i, all);
        let to = |key: usize| key.clamp(keys.start, keys.end) - keys.start;
        row[..to(seen.start)].fill(f32::NEG_INFINITY);
        row[to(seen.end)..].fill(f32::NEG_INFINITY);
    }
}

/// The output (batch, queries, heads, d).
pub(in crate::ops) fn forward(s: &Heads, [q, k, v]: [&[f32]; 3], bias: &Bias) -> Vec<f32> {
    let ((q_len, kv_len), step) = (s.lens(), s.block(&bias.window));
    let mut y = filled(0., q.len());
    let heads = s.heads_of_block(&bias.window);
    let (width, of_block) = (s.count * s.d, heads * s.d);
    let blocks = y.par_chunks_mut(q_len).enumerate().flat_map(|(b, y)| {
        let blocks = y.par_chunks_mut(step * of_block).enumerate();
        blocks.map(move |(i, y)| (b, i * step * of_block, y))
    });
    blocks.for_each(|(b, at, y)| {
        let q = &q[b * q_len..][..q_len];
        let (k, v) = (&k[b * kv_len..][..kv_len], &v[b * kv_len..][..kv_len]);
        let (from, first, rows) = (at / width, at % width / s.d, y.len().div_ceil(of_block));
        let mut block = Block::new(s, bias, from..from + rows);
        if block.keys.is_empty() {
            return;
        }
        for i in 0..heads.min(s.count - first) {
            let h = first + i;
            block.fill(s, bias, (b, h), [q, k]);
            let v = (v, s.kv(h, &block.keys));
            let yv = View::new(i * s.d, rows, s.d, of_block);
            gemm_view((y, yv), false, (&block.p, block.view()), v, 1.);
        }
    });
    y
}

/// The gradients of q, k and v, from the output's gradient. The probabilities are computed again: those of all heads
/// would take memory with the square of the tokens.
pub(in crate::ops) fn backward(s: &Heads, qkvg: [&Tensor; 4], bias: &Bias) -> Result<[Tensor; 3]> {
    let guards = qkvg.map(Tensor::storage_and_layout);
    let mut values = [&[][..]; 4];
    for (values, (storage, layout)) in values.iter_mut().zip(&guards) {
        *values = &CpuStorage::of(storage)?.as_slice::<f32>()?[layout.start_offset()..];
    }
    let [q, k, v, g] = values;
    let ((q_len, kv_len), step) = (s.lens(), s.block(&bias.window));
    // Of each query head by itself, (batch, heads, tokens, d).
    let (of_q, of_k) = (s.queries * s.d, s.keys * s.d);
    let mut gq = filled(0., s.batch * s.count * of_q);
    let [mut gk, mut gv] = [(); 2].map(|()| filled(0., s.batch * s.count * of_k));
    let grads = gq.par_chunks_mut(of_q).zip(gk.par_chunks_mut(of_k));
    grads.zip(gv.par_chunks_mut(of_k)).enumerate().for_each(|(i, ((gq, gk), gv))| {
        let (b, h) = (i / s.count, i % s.count);
        let (q, g) = (&q[b * q_len..][..q_len], &g[b * q_len..][..q_len]);
        let (k, v) = (&k[b * kv_len..][..kv_len], &v[b * kv_len..][..kv_len]);
        let mut gs = vec![];
        for from in (0..s.queries).step_by(step) {
            let mut block = Block::new(s, bias, from..(from + step).min(s.queries));
            if block.keys.is_empty() {
                continue;
            }
            block.fill(s, bias, (b, h), [q, k]);
            let (view, queries, keys) = (block.view(), &block.queries, &block.keys);
            gs.resize(block.p.len(), 0.);
            let (gv_, k_, q_) = (s.kv(h, keys), s.kv(h, keys), s.q(h, queries));
            gemm_view((&mut gs, view), false, (g, q_), (v, gv_.t()), 1.);
            vectorized(
                #[inline(always)]
                || softmax_grad(&mut gs, &block.p, &block.capped, keys.len()),
            );
            gemm_view((gq, s.one(queries)), false, (&gs, view), (k, k_), bias.scale);
            gemm_view((gk, s.one(keys)), true, (&gs, view.t()), (q, q_), bias.scale);
            gemm_view((gv, s.one(keys)), true, (&block.p, view.t()), (g, q_), 1.);
        }
    });
    let tensor = |values, heads, like: &Tensor| {
        let by_head = Tensor::from_vec(values, (s.batch, heads, (), s.d), like.device())?;
        by_head.transpose(1, 2)
    };
    let [gk, gv] = [gk, gv].map(|by_head| sum_groups(by_head, s.count / s.kv_count, of_k));
    let grads = [(gq, s.count), (gk, s.kv_count), (gv, s.kv_count)];
    let [gq, gk, gv] = grads.map(|(values, heads)| tensor(values, heads, qkvg[0]));
    Ok([gq?, gk?, gv?])
}

/// The sum of each `group` of consecutive parts of `len` values.
fn sum_groups(parts: Vec<f32>, group: usize, len: usize) -> Vec<f32> {
    if group == 1 {
        return parts;
    }
    let mut sums = filled(0., parts.len() / group);
    sums.par_chunks_mut(len).zip(parts.par_chunks(group * len)).for_each(|(sum, parts)| {
        parts.chunks_exact(len).for_each(|part| add_assign(sum, part));
    });
    sums
}

/// Rows of `n` scores to probabilities.
#[inline(always)]
fn softmax(scores: &mut [f32], n: usize) {
    for row in scores.chunks_exact_mut(n) {
        let max = max(row);
        // A row without any key stays at -∞, instead of NaN.
        if max != f32::NEG_INFINITY {
            row.iter_mut().for_each(|s| *s -= max);
        }
    }
    // One loop over all rows: a short row has few whole vectors.
    scores.iter_mut().for_each(|s| *s = exp_nonpositive(*s));
    for row in scores.chunks_exact_mut(n) {
        let sum = sum(row, row, |s, _| s);
        let scale = if sum == 0. { 0. } else { 1. / sum };
        row.iter_mut().for_each(|s| *s *= scale);
    }
}

/// The gradient of the scores before their cap from that of the probabilities `p`, in place.
#[inline(always)]
fn softmax_grad(grads: &mut [f32], p: &[f32], capped: &[f32], n: usize) {
    for (g, p) in grads.chunks_exact_mut(n).zip(p.chunks_exact(n)) {
        let dot = sum(p, g, |p, g| p * g);
        g.iter_mut().zip(p).for_each(|(g, p)| *g = p * (*g - dot));
    }
    grads.iter_mut().zip(capped).for_each(|(g, t)| *g *= 1. - t * t);
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    let (e, squares) = (exp_nonpositive(-2. * x.abs()), x * x);
    let far = ((1. - e) / (1. + e)).copysign(x);
    // Near 0 the difference of 1 and e has few digits.
    const SERIES: [f32; 4] = [-1. / 3., 2. / 15., -17. / 315., 62. / 2835.];
    let [a, b, c, d] = SERIES;
    let near = x + x * squares * (a + squares * (b + squares * (c + squares * d)));
    if squares < 0.09 {
        near
    } else {
        far
    }
}
