//! Scaled dot-product attention with grouped heads as one operation: `y = softmax(scale·q·kᵀ + mask)·v`.
//!
//! With the probabilities p, which the backward computes again, `gv = pᵀ·g`, `gp = g·vᵀ`,
//! `gs = scale·p ∘ (gp - Σ p∘gp)`, `gq = gs·k` and `gk = gsᵀ·q`.

use super::backend::Backend;
use super::cpu::attention::{backward, forward, Heads, MaskRows};
use super::cpu::{f32_slices, FUSED_ATTENTION};
use super::op::{run, Fused, Grads, Operand};
use super::softmax::softmax_last_dim;
use candle_core::{bail, CpuStorage, DType, Device, Result, Shape, Tensor};

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
    let mask = match mask {
        Mask::None => None,
        Mask::Added(mask) => Some(mask.clone()),
        Mask::Causal { offset } => Some(causal(queries, keys, offset, q.device())?),
    };
    run(AttentionOp { heads, scale, mask, softcap }, [q, k, v])
}

/// 0 where query i sees key j, j ≤ i + offset, else -∞.
fn causal(queries: usize, keys: usize, offset: usize, device: &Device) -> Result<Tensor> {
    let value = |i, j| if j <= i + offset { 0f32 } else { f32::NEG_INFINITY };
    let mask = (0..queries).flat_map(|i| (0..keys).map(move |j| value(i, j)));
    Tensor::from_vec(mask.collect(), (queries, keys), device)
}

struct AttentionOp {
    heads: Heads,
    scale: f64,
    /// Broadcasts to the scores.
    mask: Option<Tensor>,
    softcap: Option<f64>,
}

impl AttentionOp {
    fn with_mask<R>(&self, f: impl FnOnce(Option<MaskRows>) -> Result<R>) -> Result<R> {
        let Some(mask) = &self.mask else { return f(None) };
        let Heads { batch, count, queries, keys, .. } = self.heads;
        let mask =
            mask.detach().to_dtype(DType::F32)?.broadcast_as((batch, count, queries, keys))?;
        // Rows of keys are contiguous; a mask with one value for a whole row is expanded.
        let mask = if mask.stride()[3] == 1 { mask } else { mask.contiguous()? };
        let (storage, layout) = mask.storage_and_layout();
        let values = &CpuStorage::of(&storage)?.as_slice::<f32>()?[layout.start_offset()..];
        let stride = layout.stride();
        f(Some(MaskRows { values, strides: [stride[0], stride[1], stride[2]] }))
    }
}

impl Fused<3> for AttentionOp {
    const NAME: &'static str = "attention";

    fn fused_dtype(&self, qkv: [&Tensor; 3]) -> Option<DType> {
        let fused = FUSED_ATTENTION
            && self.softcap.is_none()
            && !self.mask.as_ref().is_some_and(Tensor::track_op)
            && self.heads.keys > 0
            && qkv.iter().all(|x| x.dtype() == DType::F32);
        fused.then_some(DType::F32)
    }

    fn forward(&self, qkv: [Operand; 3]) -> Result<(CpuStorage, Shape)> {
        let shape = qkv[0].1.shape().clone();
        let qkv = f32_slices(qkv)?;
        self.with_mask(|mask| Ok((CpuStorage::F32(forward(&self.heads, qkv, mask)), shape)))
    }

    fn backward(&self, qkv: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<Grads<3>> {
        let ([q, k, v], grad) = (qkv, grad.contiguous()?);
        let grads = self.with_mask(|mask| backward(&self.heads, [q, k, v, &grad], mask))?;
        Ok(std::array::from_fn(|i| qkv[i].track_op().then(|| grads[i].clone())))
    }

    fn composed(&self, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let count = self.heads.count;
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
        let mut scores = (by_head(q)? * self.scale)?.matmul(&by_head(k)?.t()?)?;
        if let Some(cap) = self.softcap {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        if let Some(mask) = &self.mask {
            scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
        }
        softmax_last_dim(&scores)?.matmul(&by_head(v)?)?.transpose(1, 2)?.contiguous()
    }
}
