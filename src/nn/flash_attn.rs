//! The functions of the crate `candle_flash_attn` with a backward, on every device and in every floating dtype.
//!
//! Many model files for candle have a branch for `candle_flash_attn`, behind their feature `flash-attn` and a flag such as
//! `use_flash_attn`. It trains here with one more line:
//!
//! ```
//! use loralib::nn::flash_attn as candle_flash_attn;
//! # use candle_core::{DType, Device, Result, Tensor};
//! # fn main() -> Result<()> {
//! let x = Tensor::ones((1, 5, 4, 8), DType::F32, &Device::Cpu)?; // (batch, tokens, heads, d)
//! let y = candle_flash_attn::flash_attn(&x, &x, &x, 0.35, true)?;
//! assert_eq!(y.dims(), [1, 5, 4, 8]);
//! # Ok(())
//! # }
//! ```
//!
//! Memory is linear in the tokens: scores are computed for a block of queries at a time, and again in the backward. The
//! graph keeps q, k, v and the output. Names, arguments and results are those of `candle_flash_attn`: the last query is
//! beside the last key, so that with `causal` query i sees the keys up to i + keys - queries; a window has a left and a right
//! bound, where 0 is the query's own position and `None` no bound; a query that sees no key gives zeros. Head sizes are not
//! limited.

#![allow(clippy::too_many_arguments)] // as candle_flash_attn's functions have

use crate::ops::{attention, attention_varlen, Scores, Window};
use candle_core::{Result, Tensor};

/// Attention of `q` (batch, queries, heads, d), `k` and `v` (batch, keys, kv_heads, d) to (batch, queries, heads, d).
///
/// # Errors
/// If the shapes do not fit, or q, k and v are not of one dtype of floats.
pub fn flash_attn(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    fixed(q, k, v, None, softmax_scale, right_of(causal), None)
}

/// [`flash_attn`] with a window.
///
/// # Errors
/// If the shapes do not fit, or q, k and v are not of one dtype of floats.
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    fixed(q, k, v, None, softmax_scale, (window_size_left, window_size_right), None)
}

/// [`flash_attn`] with ALiBi: minus `alibi_slopes` (heads) times the distance of query and key is added to the scores.
///
/// # Errors
/// As [`flash_attn`], and if the slopes lead to a variable.
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    fixed(q, k, v, Some(alibi_slopes), softmax_scale, right_of(causal), None)
}

/// [`flash_attn_alibi`] with a window.
///
/// # Errors
/// If the shapes do not fit, or q, k and v are not of one dtype of floats.
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let window = (window_size_left, window_size_right);
    fixed(q, k, v, Some(alibi_slopes), softmax_scale, window, None)
}

/// [`flash_attn_windowed`] with ALiBi, if there are slopes, and scores `softcap·tanh(scores/softcap)`; a softcap of 0 is
/// none.
///
/// # Errors
/// If the shapes do not fit, or q, k and v are not of one dtype of floats.
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let window = (window_size_left, window_size_right);
    fixed(q, k, v, alibi_slopes, softmax_scale, window, Some(softcap))
}

/// Attention within each of several sequences: `q` (all queries, heads, d), `k` and `v` (all keys, kv_heads, d) to
/// (all queries, heads, d). Sequence i is the rows from `seqlens_q[i]` to `seqlens_q[i + 1]` of `q`, and so for the keys:
/// integers (sequences + 1), the first 0 and the last the number of rows. They are read on the host.
///
/// # Errors
/// If the shapes or the lengths do not fit, or a sequence is longer than its maximum.
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let lens = [(seqlens_q, max_seqlen_q), (seqlens_k, max_seqlen_k)];
    let scores = scores(None, softmax_scale, right_of(causal), None);
    attention_varlen([q, k, v], lens, scores)
}

/// [`flash_attn_varlen`] with a window.
///
/// # Errors
/// As [`flash_attn_varlen`].
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let lens = [(seqlens_q, max_seqlen_q), (seqlens_k, max_seqlen_k)];
    let scores = scores(None, softmax_scale, (window_size_left, window_size_right), None);
    attention_varlen([q, k, v], lens, scores)
}

/// [`flash_attn_varlen`] with ALiBi.
///
/// # Errors
/// As [`flash_attn_varlen`].
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let lens = [(seqlens_q, max_seqlen_q), (seqlens_k, max_seqlen_k)];
    let scores = scores(Some(alibi_slopes), softmax_scale, right_of(causal), None);
    attention_varlen([q, k, v], lens, scores)
}

/// [`flash_attn_varlen`] with ALiBi and a window.
///
/// # Errors
/// As [`flash_attn_varlen`].
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let lens = [(seqlens_q, max_seqlen_q), (seqlens_k, max_seqlen_k)];
    let window = (window_size_left, window_size_right);
    attention_varlen([q, k, v], lens, scores(Some(alibi_slopes), softmax_scale, window, None))
}

/// [`flash_attn_varlen`] with ALiBi, if there are slopes, a window and a softcap.
///
/// # Errors
/// As [`flash_attn_varlen`].
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let lens = [(seqlens_q, max_seqlen_q), (seqlens_k, max_seqlen_k)];
    let window = (window_size_left, window_size_right);
    attention_varlen([q, k, v], lens, scores(alibi_slopes, softmax_scale, window, Some(softcap)))
}

type Bounds = (Option<usize>, Option<usize>);

fn right_of(causal: bool) -> Bounds {
    (None, causal.then_some(0))
}

fn fixed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    slopes: Option<&Tensor>,
    scale: f32,
    window: Bounds,
    softcap: Option<f32>,
) -> Result<Tensor> {
    let mut scores = scores(slopes, scale, window, softcap);
    scores.window.offset = k.dim(1)? as i64 - q.dim(1)? as i64;
    attention(q, k, v, scores)
}

fn scores(
    slopes: Option<&Tensor>,
    scale: f32,
    (left, right): Bounds,
    softcap: Option<f32>,
) -> Scores {
    Scores {
        scale: f64::from(scale),
        softcap: softcap.filter(|cap| *cap > 0.).map(f64::from),
        window: Window { offset: 0, left, right },
        slopes: slopes.cloned(),
        mask: None,
    }
}
