//! [`candle_nn::attention`] with a backward on the CPU.

use crate::ops::{attention, Mask};
use candle_core::{bail, Result, Tensor, WithDType};

pub use candle_nn::attention::*;

/// [`candle_nn::attention::flash_attn`] with a backward: `q` (batch, queries, heads, d), `k` and `v` (batch,
/// keys, kv_heads, d) to (batch, heads, queries, d).
///
/// # Errors
/// If the shapes do not fit, or `max_bias` (ALiBi) is set where a gradient is wanted.
pub fn flash_attn<T: WithDType + num_traits::Float>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    attn_mask: AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    if !(q.track_op() || k.track_op() || v.track_op()) {
        let candle = candle_nn::attention::flash_attn::<T>;
        return candle(q, k, v, softmax_scale, attn_mask, max_bias, softcap);
    }
    if max_bias.is_some_and(|bias| bias != 0.) {
        bail!("flash_attn: ALiBi (max_bias) has no backward")
    }
    let mask = match &attn_mask {
        AttnMask::None => Mask::None,
        AttnMask::Mask(mask) => Mask::Added(mask),
        AttnMask::Causal { kv_offset } => Mask::Causal { offset: *kv_offset },
    };
    let softcap = softcap.filter(|cap| *cap > 0.).map(f64::from);
    attention(q, k, v, f64::from(softmax_scale), mask, softcap)?.transpose(1, 2)
}

/// Multi-head attention with a fused backward on the CPU: `q` (batch, queries, heads, d), `k` and `v` (batch,
/// keys, kv_heads, d) to (batch, queries, heads, d). `mask` is added to the scores, to which (batch, heads,
/// queries, keys) it broadcasts. Not in candle_nn.
///
/// A query whose mask is -∞ for every key gives zeros where the operation is fused (F32 on an x86-64 CPU with the
/// feature `faer`), as [`flash_attn`] does, and NaN elsewhere, as [`softmax`](crate::nn::ops::softmax) does.
///
/// # Errors
/// If the shapes do not fit.
pub fn multi_head_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    attention(q, k, v, scale, mask.map_or(Mask::None, Mask::Added), None)
}
