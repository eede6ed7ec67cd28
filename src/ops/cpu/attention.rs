//! Attention in F32, one batch item at a time in each thread.

use super::gemm::{gemm_view, View};
use super::rows::{exp_nonpositive, max, sum, vectorized};
use crate::ops::backend::Backend;
use candle_core::{CpuStorage, Result, Tensor};
use rayon::prelude::*;

/// The sizes: `count` query heads of `d` values, `kv_count` heads of keys and values.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Heads {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub count: usize,
    pub kv_count: usize,
    pub d: usize,
    pub scale: f32,
}

impl Heads {
    /// Values of one item of q, and of k or v.
    fn lens(&self) -> (usize, usize) {
        (self.queries * self.count * self.d, self.keys * self.kv_count * self.d)
    }

    /// Head `h` of an item of q.
    fn q(&self, h: usize) -> View {
        View::new(h * self.d, self.queries, self.d, self.count * self.d)
    }

    /// The keys or values of query head `h` in an item of k or v.
    fn kv(&self, h: usize) -> View {
        let h = h / (self.count / self.kv_count);
        View::new(h * self.d, self.keys, self.d, self.kv_count * self.d)
    }

    /// Scores or probabilities of one head.
    fn square(&self) -> View {
        View::new(0, self.queries, self.keys, self.keys)
    }
}

/// What is added to the scores: rows of keys.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct MaskRows<'a> {
    pub values: &'a [f32],
    /// The strides of batch, heads and queries.
    pub strides: [usize; 3],
}

/// The probabilities of head `h` of item `b` into `p` (queries, keys).
fn probabilities(
    s: &Heads,
    (b, h): (usize, usize),
    [q, k]: [&[f32]; 2],
    mask: Option<MaskRows>,
    p: &mut [f32],
) {
    gemm_view((p, s.square()), false, (q, s.q(h)), (k, s.kv(h).t()), s.scale);
    let row = |i: usize| {
        mask.map(|MaskRows { values, strides: [of_b, of_h, of_i] }| {
            &values[b * of_b + h * of_h + i * of_i..][..s.keys]
        })
    };
    vectorized(
        #[inline(always)]
        || softmax(p, s.keys, row),
    );
}

/// The output (batch, queries, heads, d).
pub(in crate::ops) fn forward(
    s: &Heads,
    [q, k, v]: [&[f32]; 3],
    mask: Option<MaskRows>,
) -> Vec<f32> {
    let (q_len, kv_len) = s.lens();
    let mut y = vec![0.; q.len()];
    y.par_chunks_mut(q_len).enumerate().for_each(|(b, y)| {
        let q = &q[b * q_len..][..q_len];
        let (k, v) = (&k[b * kv_len..][..kv_len], &v[b * kv_len..][..kv_len]);
        let mut p = vec![0.; s.queries * s.keys];
        for h in 0..s.count {
            probabilities(s, (b, h), [q, k], mask, &mut p);
            gemm_view((y, s.q(h)), false, (&p, s.square()), (v, s.kv(h)), 1.);
        }
    });
    y
}

/// The gradients of q, k and v, from the output's gradient. The probabilities are computed again: those of all heads
/// would take memory with the square of the tokens.
pub(in crate::ops) fn backward(
    s: &Heads,
    qkvg: [&Tensor; 4],
    mask: Option<MaskRows>,
) -> Result<[Tensor; 3]> {
    let guards = qkvg.map(Tensor::storage_and_layout);
    let mut values = [&[][..]; 4];
    for (values, (storage, layout)) in values.iter_mut().zip(&guards) {
        *values = &CpuStorage::of(storage)?.as_slice::<f32>()?[layout.start_offset()..];
    }
    let [q, k, v, g] = values;
    let ((q_len, kv_len), square) = (s.lens(), s.queries * s.keys);
    let mut gq = vec![0.; s.batch * q_len];
    let (mut gk, mut gv) = (vec![0.; s.batch * kv_len], vec![0.; s.batch * kv_len]);
    let grads = gq.par_chunks_mut(q_len).zip(gk.par_chunks_mut(kv_len));
    grads.zip(gv.par_chunks_mut(kv_len)).enumerate().for_each(|(b, ((gq, gk), gv))| {
        let (q, g) = (&q[b * q_len..][..q_len], &g[b * q_len..][..q_len]);
        let (k, v) = (&k[b * kv_len..][..kv_len], &v[b * kv_len..][..kv_len]);
        let (mut p, mut gs) = (vec![0.; square], vec![0.; square]);
        for h in 0..s.count {
            probabilities(s, (b, h), [q, k], mask, &mut p);
            gemm_view((&mut gs, s.square()), false, (g, s.q(h)), (v, s.kv(h).t()), 1.);
            vectorized(
                #[inline(always)]
                || softmax_grad(&mut gs, &p, s.keys),
            );
            // The heads of a group add to the gradients of their keys and values.
            gemm_view((gq, s.q(h)), false, (&gs, s.square()), (k, s.kv(h)), s.scale);
            gemm_view((gk, s.kv(h)), true, (&gs, s.square().t()), (q, s.q(h)), s.scale);
            gemm_view((gv, s.kv(h)), true, (&p, s.square().t()), (g, s.q(h)), 1.);
        }
    });
    let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
    Ok([tensor(gq, qkvg[0])?, tensor(gk, qkvg[1])?, tensor(gv, qkvg[2])?])
}

/// Rows of `n` scores, plus their mask, to probabilities.
#[inline(always)]
fn softmax<'m>(scores: &mut [f32], n: usize, mask: impl Fn(usize) -> Option<&'m [f32]>) {
    for (i, row) in scores.chunks_exact_mut(n).enumerate() {
        if let Some(mask) = mask(i) {
            row.iter_mut().zip(mask).for_each(|(s, m)| *s += m);
        }
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

/// The gradient of the scores from that of the probabilities `p`, in place.
#[inline(always)]
fn softmax_grad(grads: &mut [f32], p: &[f32], n: usize) {
    for (g, p) in grads.chunks_exact_mut(n).zip(p.chunks_exact(n)) {
        let dot = sum(p, g, |p, g| p * g);
        g.iter_mut().zip(p).for_each(|(g, p)| *g = p * (*g - dot));
    }
}
