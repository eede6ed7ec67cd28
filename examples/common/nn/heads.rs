//! Attention on the CPU in F32, a sentence in one thread: a head's scores stay in its cache, and its
//! values are multiplied where they lie.

use super::exp::exp_negative;
use super::rows::{max, sum, values, vectorized};
use candle_core::{bail, Device, Result, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// The sizes: `count` heads, each of `n / count` values of a token.
pub struct Heads {
    pub batch: usize,
    pub tokens: usize,
    pub n: usize,
    pub count: usize,
    /// The factor of the scores, `1 / √(n / count)`.
    pub scale: f64,
}

impl Heads {
    /// Of q, k and v, which are of one shape.
    pub fn new([q, k, v]: [&Tensor; 3], count: usize) -> Result<Self> {
        let (batch, tokens, n) = q.dims3()?;
        if k.shape() != q.shape() || v.shape() != q.shape() || q.elem_count() == 0 {
            bail!("attention: of {:?}, {:?} and {:?}", q.dims(), k.dims(), v.dims())
        }
        if count == 0 || !n.is_multiple_of(count) {
            bail!("attention: {n} values do not divide into {count} heads")
        }
        Ok(Self { batch, tokens, n, count, scale: (count as f64 / n as f64).sqrt() })
    }

    /// The output, and the probabilities behind it (batch, heads, tokens, tokens). `None` unless all
    /// is F32 and contiguous on the CPU.
    pub fn forward(
        &self,
        [q, k, v]: &[Tensor; 3],
        mask: Option<&Tensor>,
    ) -> Result<Option<(Vec<f32>, Vec<f32>)>> {
        let Some(mask) = mask else {
            return Ok(values([q, k, v], |qkv| self.output(qkv, |_, _, _| None)));
        };
        let scores = (self.batch, self.count, self.tokens, self.tokens);
        let spread = mask.broadcast_as(scores)?;
        let [sentence, head, token, 1] = *spread.stride() else { return Ok(None) };
        Ok(values([q, k, v, mask], |[q, k, v, mask]| {
            let at = |i, h, t| i * sentence + h * head + t * token;
            self.output([q, k, v], |i, h, t| Some(&mask[at(i, h, t)..][..self.tokens]))
        }))
    }

    fn output<'m>(
        &self,
        qkv: [&[f32]; 3],
        mask: impl Fn(usize, usize, usize) -> Option<&'m [f32]> + Sync,
    ) -> (Vec<f32>, Vec<f32>) {
        let (sentence, square) = (self.tokens * self.n, self.tokens * self.tokens);
        let mut y = vec![0.; self.batch * sentence];
        let mut p = vec![0.; self.batch * self.count * square];
        let sentences = y.par_chunks_mut(sentence).zip(p.par_chunks_mut(self.count * square));
        sentences.enumerate().for_each(|(i, (y, p))| {
            let qkv = qkv.map(|x| &x[i * sentence..][..sentence]);
            for (h, p) in p.chunks_exact_mut(square).enumerate() {
                let [q, k, v] = qkv.map(|x| self.of(x, h));
                let scores = MatMut::from_row_major_slice_mut(&mut *p, self.tokens, self.tokens);
                product(scores, q, k.transpose(), self.scale as f32);
                vectorized(
                    #[inline(always)]
                    || softmax(p, self.tokens, |t| mask(i, h, t)),
                );
                product(self.of_mut(y, h), self.square(p), v, 1.);
            }
        });
        (y, p)
    }

    /// The gradients towards q, k and v, from the probabilities and the output's.
    pub fn backward(
        &self,
        [q, k, v]: &[Tensor; 3],
        p: &[f32],
        grad: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let grads = values([q, k, v, &grad.contiguous()?], |qkvg| self.gradients(qkvg, p));
        let Some([gq, gk, gv]) = grads else { bail!("attention: a gradient like {grad:?}") };
        let tensor = |values| Tensor::from_vec(values, q.shape(), &Device::Cpu);
        Ok([tensor(gq)?, tensor(gk)?, tensor(gv)?])
    }

    fn gradients(&self, qkvg: [&[f32]; 4], p: &[f32]) -> [Vec<f32>; 3] {
        let (sentence, square) = (self.tokens * self.n, self.tokens * self.tokens);
        let zeros = || vec![0.; self.batch * sentence];
        let (mut gq, mut gk, mut gv) = (zeros(), zeros(), zeros());
        let grads = gq.par_chunks_mut(sentence).zip(gk.par_chunks_mut(sentence));
        let grads = grads.zip(gv.par_chunks_mut(sentence)).zip(p.par_chunks(self.count * square));
        let scale = self.scale as f32;
        grads.enumerate().for_each_init(
            || vec![0.; square],
            |gs, (i, (((gq, gk), gv), p))| {
                let qkvg = qkvg.map(|x| &x[i * sentence..][..sentence]);
                for (h, p) in p.chunks_exact(square).enumerate() {
                    let [q, k, v, g] = qkvg.map(|x| self.of(x, h));
                    let scores = MatMut::from_row_major_slice_mut(gs, self.tokens, self.tokens);
                    product(scores, g, v.transpose(), 1.);
                    vectorized(
                        #[inline(always)]
                        || softmax_grad(gs, p, self.tokens),
                    );
                    let (gs, p) = (self.square(gs), self.square(p));
                    product(self.of_mut(gq, h), gs, k, scale);
                    product(self.of_mut(gk, h), gs.transpose(), q, scale);
                    product(self.of_mut(gv, h), p.transpose(), g, 1.);
                }
            },
        );
        [gq, gk, gv]
    }

    /// Head `h` of a sentence (tokens, n).
    fn of<'a>(&self, x: &'a [f32], h: usize) -> MatRef<'a, f32> {
        let d = self.n / self.count;
        MatRef::from_row_major_slice_with_stride(&x[h * d..], self.tokens, d, self.n)
    }

    fn of_mut<'a>(&self, x: &'a mut [f32], h: usize) -> MatMut<'a, f32> {
        let d = self.n / self.count;
        // As the transposed: faer 0.24's constructor by rows takes their stride for the columns'.
        MatMut::from_column_major_slice_with_stride_mut(&mut x[h * d..], d, self.tokens, self.n)
            .transpose_mut()
    }

    fn square<'a>(&self, x: &'a [f32]) -> MatRef<'a, f32> {
        MatRef::from_row_major_slice(x, self.tokens, self.tokens)
    }
}

/// `y = scale·a·b`
fn product(y: MatMut<f32>, a: MatRef<f32>, b: MatRef<f32>, scale: f32) {
    matmul(y, Accum::Replace, a, b, scale, Par::Seq);
    // faer's kernels leave the upper halves of the vector registers in use, which slows what follows.
    #[cfg(target_arch = "x86_64")]
    if let Some(avx) = pulp::core_arch::x86::Avx::try_new() {
        avx._mm256_zeroupper();
    }
}

/// Makes probabilities of rows of `n` scores, to each of which its mask is added.
#[inline(always)]
fn softmax<'m>(scores: &mut [f32], n: usize, mask: impl Fn(usize) -> Option<&'m [f32]>) {
    for (t, row) in scores.chunks_exact_mut(n).enumerate() {
        if let Some(mask) = mask(t) {
            row.iter_mut().zip(mask).for_each(|(s, m)| *s += m);
        }
        let top = max(row);
        row.iter_mut().for_each(|s| *s -= top);
    }
    // All rows in one loop: a short row has few whole vectors.
    scores.iter_mut().for_each(|s| *s = exp_negative(*s));
    for row in scores.chunks_exact_mut(n) {
        let share = 1. / sum(row, row, |s, _| s);
        row.iter_mut().for_each(|s| *s *= share);
    }
}

/// Makes gradients of the scores of those of the probabilities `p`.
#[inline(always)]
fn softmax_grad(grads: &mut [f32], p: &[f32], n: usize) {
    for (g, p) in grads.chunks_exact_mut(n).zip(p.chunks_exact(n)) {
        let along = sum(p, g, |p, g| p * g);
        g.iter_mut().zip(p).for_each(|(g, p)| *g = p * (*g - along));
    }
}
