//! Scaled dot-product attention with grouped heads as one operation: `y = softmax(scale·q·kᵀ + mask)·v`.
//!
//! With the probabilities p, which the backward computes again, `gv = pᵀ·g`, `gp = g·vᵀ`,
//! `gs = scale·p ∘ (gp - Σ p∘gp)`, `gq = gs·k` and `gk = gsᵀ·q`.

use super::backend::Backend;
use super::cpu::attention::{backward, forward, Heads, MaskRows};
use super::cpu::FUSED_ATTENTION;
use super::op::{Custom, Op};
use super::softmax::softmax_last_dim;
use candle_core::{bail, CpuStorage, DType, Device, Layout, Result, Shape, Tensor};

/// What is added to the scores (batch, heads, queries, keys).
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mask<'a> {
    None,
    /// Broadcasts to the scores.
    Added(&'a Tensor),
    /// Query i sees the keys up to i + offset.
    Causal {
        offset: usize,
    },
}

/// `q` (batch, queries, heads, d), `k` and `v` (batch, keys, kv_heads, d) to (batch, queries, heads, d).
/// kv_heads divides heads.
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    mask: Mask,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let ((batch, queries, count, d), (kb, keys, kv_count, kd)) = (q.dims4()?, k.dims4()?);
    if kb != batch || kd != d || v.dims() != k.dims() || kv_count == 0 || count % kv_count != 0 {
        bail!("attention: q is {:?}, k {:?} and v {:?}", q.dims(), k.dims(), v.dims())
    }
    let heads = Heads { batch, queries, keys, count, kv_count, d, scale: scale as f32 };
    let scores = (batch, count, queries, keys);
    let fused = FUSED_ATTENTION
        && softcap.is_none()
        && q.elem_count() > 0
        && keys > 0
        && [q, k, v].iter().all(|x| matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32);
    if !fused {
        return composed(q, k, v, scale, mask, softcap);
    }
    let mask = match mask {
        Mask::None => None,
        Mask::Added(mask) if mask.track_op() => {
            return composed(q, k, v, scale, Mask::Added(mask), None)
        }
        Mask::Added(mask) => Some(mask.to_dtype(DType::F32)?.broadcast_as(scores)?),
        Mask::Causal { offset } => {
            Some(causal(queries, keys, offset, q.device())?.broadcast_as(scores)?)
        }
    };
    let op = AttentionOp { heads, mask };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Custom(op))
}

/// 0 where query i sees key j, j ≤ i + offset, else -∞.
fn causal(queries: usize, keys: usize, offset: usize, device: &Device) -> Result<Tensor> {
    let value = |i, j| if j <= i + offset { 0f32 } else { f32::NEG_INFINITY };
    let mask = (0..queries).flat_map(|i| (0..keys).map(move |j| value(i, j)));
    Tensor::from_vec(mask.collect(), (queries, keys), device)
}

struct AttentionOp {
    heads: Heads,
    /// Broadcast to the scores.
    mask: Option<Tensor>,
}

impl AttentionOp {
    fn with_mask<R>(&self, f: impl FnOnce(Option<MaskRows>) -> Result<R>) -> Result<R> {
        let Some(mask) = &self.mask else { return f(None) };
        // Rows of keys are contiguous; a mask with one value for a whole row is expanded.
        let mask = if mask.stride()[3] == 1 { mask.clone() } else { mask.contiguous()? };
        let (storage, layout) = mask.storage_and_layout();
        let values = &CpuStorage::of(&storage)?.as_slice::<f32>()?[layout.start_offset()..];
        let stride = layout.stride();
        f(Some(MaskRows { values, strides: [stride[0], stride[1], stride[2]] }))
    }
}

impl Op<3> for AttentionOp {
    const NAME: &'static str = "attention";

    fn forward<S: Backend>(&self, [(q, l), k, v]: [(&S, &Layout); 3]) -> Result<(S, Shape)> {
        let (y, ()) = self.with_mask(|mask| {
            S::on_f32([(q, l), k, v], |qkv| Ok((forward(&self.heads, qkv, mask), ())))
        })?;
        Ok((y, l.shape().clone()))
    }

    fn backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = grad.contiguous()?;
        let [gq, gk, gv] = self.with_mask(|mask| backward(&self.heads, [q, k, v, &grad], mask))?;
        let tracked = |x: &Tensor, g: Tensor| x.track_op().then_some(g);
        Ok([tracked(q, gq), tracked(k, gk), tracked(v, gv)])
    }
}

/// Attention composed of candle's operations.
fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    mask: Mask,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let (queries, keys, count) = (q.dim(1)?, k.dim(1)?, q.dim(2)?);
    let by_head = |x: &Tensor| {
        let x = x.transpose(1, 2)?.contiguous()?;
        let (batch, heads, tokens, d) = x.dims4()?;
        let repeat = count / heads;
        if repeat == 1 {
            return Ok(x);
        }
        let x = x.unsqueeze(2)?.expand((batch, heads, repeat, tokens, d))?;
        x.reshape((batch, count, tokens, d))
    };
    let scores = (by_head(q)? * scale)?.matmul(&by_head(k)?.t()?)?;
    let scores = match softcap {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let scores = match mask {
        Mask::None => scores,
        Mask::Added(mask) => scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?,
        Mask::Causal { offset } => {
            let mask = causal(queries, keys, offset, q.device())?;
            scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?
        }
    };
    softmax_last_dim(&scores)?.matmul(&by_head(v)?)?.transpose(1, 2)?.contiguous()
}
