//! [`candle_nn::attention`] with a backward.

use crate::ops::{attention, Scores, Window};
use candle_core::{bail, DType, Result, Tensor, WithDType};

pub use candle_nn::attention::*;

/// [`candle_nn::attention::flash_attn`] with a backward: `q` (batch, queries, heads, d), `k` and `v` (batch,
/// keys, kv_heads, d) to (batch, heads, queries, d).
///
/// # Errors
/// If the shapes do not fit, or `max_bias` (ALiBi) is set without [`AttnMask::Causal`] where a gradient is wanted.
pub fn flash_attn<T: WithDType + num_traits::Float>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    attn_mask: AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    if by_candle(q, k, v, &attn_mask, max_bias, softcap)? {
        let candle = candle_nn::attention::flash_attn::<T>;
        return candle(q, k, v, softmax_scale, attn_mask, max_bias, softcap);
    }
    let (mut window, mut mask) = (Window::default(), None);
    match attn_mask {
        AttnMask::None => {}
        AttnMask::Mask(added) => mask = Some(added),
        AttnMask::Causal { kv_offset } => {
            window = Window::causal(i64::try_from(kv_offset).unwrap_or(i64::MAX));
        }
    }
    let slopes = match max_bias.filter(|bias| *bias > 0.) {
        None => None,
        Some(_) if window.right.is_none() => {
            bail!("flash_attn: ALiBi (max_bias) has a backward with AttnMask::Causal alone")
        }
        Some(bias) => Some(slopes(bias, q)?),
    };
    let softcap = softcap.filter(|cap| *cap > 0.).map(f64::from);
    let scores = Scores { scale: f64::from(softmax_scale), softcap, window, slopes, mask };
    attention(q, k, v, scores)?.transpose(1, 2)
}

/// Whether candle's own kernel computes it: without a gradient, on the CPU, and for what it computes as it says. In a batch it
/// takes no mask, no softcap and no BF16, and aligns the last query with the last key whatever the offset.
fn by_candle(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<bool> {
    let tracked = matches!(mask, AttnMask::Mask(mask) if mask.track_op());
    let tracked = tracked || [q, k, v].iter().any(|x| x.track_op());
    let (batch, queries, keys) = (q.dim(0)?, q.dim(1)?, k.dim(1)?);
    let fits = match mask {
        AttnMask::None => true,
        AttnMask::Mask(_) => batch == 1,
        AttnMask::Causal { kv_offset } => {
            keys >= queries && (batch == 1 || *kv_offset == keys - queries)
        }
    };
    let plain = softcap.is_none() && matches!(q.dtype(), DType::F32 | DType::F16);
    // Without a causal mask candle multiplies the mask by ALiBi's slopes.
    let only = max_bias.is_some_and(|bias| bias > 0.) && !mask.is_causal();
    Ok(!tracked && q.device().is_cpu() && (only || fits && (batch == 1 || plain)))
}

/// candle's slopes of ALiBi for the heads of `q` (batch, queries, heads, d).
fn slopes(max_bias: f32, q: &Tensor) -> Result<Tensor> {
    let heads = q.dim(2)?;
    let steps = heads.next_power_of_two() as f32;
    let slopes = (1..=heads).map(|h| 2f32.powf(-max_bias * h as f32 / steps));
    Tensor::from_vec(slopes.collect(), heads, q.device())?.to_dtype(DType::F32)
}

/// Multi-head attention with a backward: `q` (batch, queries, heads, d), `k` and `v` (batch,
/// keys, kv_heads, d) to (batch, queries, heads, d). `mask` is added to the scores, to which (batch, heads,
/// queries, keys) it broadcasts. Not in candle_nn. Memory is linear in the tokens, but for a mask with a gradient;
/// [`flash_attn`](crate::nn::flash_attn) takes a causal mask without a matrix.
///
/// A query whose mask is -∞ for every key gives zeros where the operation is fused (F32, F16 and BF16 on an x86-64
/// CPU with the feature `faer`, and a mask without a gradient), as [`flash_attn`] does, and NaN elsewhere, as
/// [`softmax`](crate::nn::ops::softmax) does.
///
/// # Errors
/// If the shapes do not fit, or q, k and v are not of one dtype of floats, or the mask not of floats.
pub fn multi_head_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    attention(q, k, v, Scores { scale, mask: mask.cloned(), ..Scores::default() })
}
