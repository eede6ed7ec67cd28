//! [`candle_nn::rotary_emb`] with a backward.

use crate::ops::{self, Rope};
use candle_core::{Result, Tensor};

pub use candle_nn::rotary_emb::{rope_i_slow, rope_slow};

type CandleRope = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

/// candle's own kernel for a constant, but where each row of the batch has more angles than tokens: it takes the next row's
/// angles for them.
fn rotate(
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    rope: Rope,
    candle: CandleRope,
) -> Result<Tensor> {
    let tokens = x.dims().get(if rope == Rope::HalvesThd { 1 } else { 2 });
    let has_more = cos.rank() == 3 && cos.dims().get(1) != tokens;
    if x.track_op() || has_more {
        ops::rope(x, cos, sin, rope)
    } else {
        candle(x, cos, sin)
    }
}

/// [`candle_nn::rotary_emb::rope`] of (batch, heads, tokens, d) with a backward.
///
/// # Errors
/// If the shapes do not fit.
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rotate(xs, cos, sin, Rope::Halves, candle_nn::rotary_emb::rope)
}

/// [`candle_nn::rotary_emb::rope_i`], interleaved, of (batch, heads, tokens, d) with a backward.
///
/// # Errors
/// If the shapes do not fit.
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rotate(xs, cos, sin, Rope::Interleaved, candle_nn::rotary_emb::rope_i)
}

/// [`candle_nn::rotary_emb::rope_thd`] of (batch, tokens, heads, d) with a backward.
///
/// # Errors
/// If the shapes do not fit.
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rotate(xs, cos, sin, Rope::HalvesThd, candle_nn::rotary_emb::rope_thd)
}
