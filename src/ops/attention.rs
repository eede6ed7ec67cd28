//! Scaled dot-product attention with grouped heads as one operation: `y = softmax(cap(scale·q·kᵀ) + bias)·v`, with
//! `cap(s) = c·tanh(s/c)`.
//!
//! Queries are computed in blocks, whose scores alone are in memory; the graph keeps q, k, v and y. With the probabilities
//! p, which the backward computes again, `gv = pᵀ·g`, `gp = g·vᵀ`, `gs = cap'·p ∘ (gp - Σ p∘gp)`, `gq = scale·gs·k` and
//! `gk = scale·gsᵀ·q`.

mod blocks;
mod varlen;

use super::backend::Backend;
use super::cpu::attention::{backward, forward, Bias, Heads, MaskRows};
use super::cpu::{f32_slices, FUSED_ATTENTION};
use super::op::{operand, run, Fused, Grads, Operand};
use super::place::is_fused;
use super::softmax::softmax_last_dim;
use super::window::Window;
use candle_core::{bail, CpuStorage, DType, Result, Shape, Tensor};

pub(crate) use varlen::attention_varlen;

/// What the scores (batch, heads, queries, keys) of attention are, beside q·kᵀ.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scores {
    pub scale: f64,
    pub softcap: Option<f64>,
    /// Which keys a query sees.
    pub window: Window,
    /// ALiBi: minus a head's slope (heads) times the distance of key and query.
    pub slopes: Option<Tensor>,
    /// Is added, and broadcasts to the scores.
    pub mask: Option<Tensor>,
}

/// `q` (batch, queries, heads, d), `k` and `v` (batch, keys, kv_heads, d) to (batch, queries, heads, d).
/// kv_heads divides heads. A query that the window leaves no key gives zeros.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scores: Scores) -> Result<Tensor> {
    let op = AttentionOp::new([q, k, v], scores)?;
    match op.scores.mask.as_ref().is_some_and(Tensor::track_op) {
        // candle's operations have three operands at most.
        true => op.whole([q, k, v]),
        false => run(op, [q, k, v]),
    }
}

struct AttentionOp {
    heads: Heads,
    scores: Scores,
}

impl AttentionOp {
    fn new([q, k, v]: [&Tensor; 3], scores: Scores) -> Result<Self> {
        let ((batch, queries, count, d), (kb, keys, kv_count, kd)) = (q.dims4()?, k.dims4()?);
        let fits = kb == batch && kd == d && v.dims() == k.dims();
        if !fits || kv_count == 0 || count % kv_count != 0 {
            let (q, k, v) = (q.dims(), k.dims(), v.dims());
            bail!("attention: q is {q:?}, k {k:?} and v {v:?}")
        }
        if let Some(slopes) = scores.slopes.as_ref().filter(|slopes| slopes.dims() != [count]) {
            bail!("attention: the ALiBi slopes are {:?}, expected [{count}]", slopes.dims())
        }
        Ok(Self { heads: Heads { batch, queries, keys, count, kv_count, d }, scores })
    }

    /// The gradients of detached arguments.
    fn grads(&self, qkv: [&Tensor; 3], g: &Tensor) -> Result<[Tensor; 3]> {
        match self.fused_dtype(qkv).filter(|_| is_fused(g.device())) {
            None => blocks::backward(self, qkv, g),
            Some(dtype) => {
                let [q, k, v] = qkv.map(|x| operand(x, dtype));
                let qkvg = [&q?, &k?, &v?, &operand(g, dtype)?];
                self.with_bias(|bias| backward(&self.heads, qkvg, bias))
            }
        }
    }

    fn with_bias<R>(&self, f: impl FnOnce(&Bias) -> Result<R>) -> Result<R> {
        let Scores { scale, softcap, window, slopes, mask } = &self.scores;
        let Heads { batch, count, queries, keys, .. } = self.heads;
        let (scale, softcap) = (*scale as f32, softcap.map(|cap| cap as f32));
        let slopes = slopes.as_ref().map(|slopes| slopes.to_dtype(DType::F32)?.to_vec1());
        let slopes = slopes.transpose()?;
        let slopes = slopes.as_deref();
        let bias = Bias { scale, softcap, window: *window, slopes, mask: None };
        let Some(mask) = mask else { return f(&bias) };
        let mask =
            mask.detach().to_dtype(DType::F32)?.broadcast_as((batch, count, queries, keys))?;
        // Rows of keys are contiguous; a mask with one value for a whole row is expanded.
        let mask = if mask.stride()[3] == 1 { mask } else { mask.contiguous()? };
        let (storage, layout) = mask.storage_and_layout();
        let values = &CpuStorage::of(&storage)?.as_slice::<f32>()?[layout.start_offset()..];
        let stride = layout.stride();
        let mask = Some(MaskRows { values, strides: [stride[0], stride[1], stride[2]] });
        f(&Bias { mask, ..bias })
    }

    /// All scores at once, with a graph.
    fn whole(&self, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let Heads { batch, queries, keys, count, kv_count, d } = self.heads;
        let by_head = |x: &Tensor| {
            let x = x.transpose(1, 2)?.contiguous()?;
            let tokens = x.dim(2)?;
            let x = x.unsqueeze(2)?.expand((batch, kv_count, count / kv_count, tokens, d))?;
            x.reshape((batch, count, tokens, d))
        };
        let q = (q.transpose(1, 2)?.contiguous()? * self.scores.scale)?;
        let mut s = q.matmul(&by_head(k)?.t()?)?;
        if let Some(cap) = self.scores.softcap {
            s = ((s / cap)?.tanh()? * cap)?;
        }
        if let Some(mask) = &self.scores.mask {
            s = s.broadcast_add(&mask.to_dtype(s.dtype())?)?;
        }
        if let Some(bias) = blocks::bias(&self.scores, 0..queries, 0..keys, keys, &q)? {
            s = s.broadcast_add(&bias.to_dtype(s.dtype())?)?;
        }
        softmax_last_dim(&s)?.matmul(&by_head(v)?)?.transpose(1, 2)?.contiguous()
    }
}

impl Fused<3> for AttentionOp {
    const NAME: &'static str = "attention";

    fn fused_dtype(&self, qkv: [&Tensor; 3]) -> Option<DType> {
        let half_or_f32 = |x: &&Tensor| matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16);
        let fused = FUSED_ATTENTION && self.heads.keys > 0 && qkv.iter().all(half_or_f32);
        fused.then_some(DType::F32)
    }

    fn forward(&self, qkv: [Operand; 3]) -> Result<(CpuStorage, Shape)> {
        let shape = qkv[0].1.shape().clone();
        let qkv = f32_slices(qkv)?;
        self.with_bias(|bias| Ok((CpuStorage::F32(forward(&self.heads, qkv, bias)), shape)))
    }

    fn backward(&self, qkv: [&Tensor; 3], _: &Tensor, g: &Tensor) -> Result<Grads<3>> {
        self.composed_backward(qkv, g, g)
    }

    fn composed(&self, qkv: [&Tensor; 3]) -> Result<Tensor> {
        blocks::forward(self, qkv)
    }

    fn composed_backward(&self, qkv: [&Tensor; 3], _: &Tensor, g: &Tensor) -> Result<Grads<3>> {
        let grads = self.grads(qkv.map(Tensor::detach).each_ref(), g)?;
        Ok(std::array::from_fn(|i| qkv[i].track_op().then(|| grads[i].clone())))
    }
}

#[cfg(test)]
mod tests;
