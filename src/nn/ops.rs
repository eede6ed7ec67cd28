//! [`candle_nn::ops`] with a backward for the operations that have none.

use crate::ops::{self, activation, Activation};
use candle_core::{Result, Tensor};

pub use candle_nn::ops::*;

/// [`candle_nn::ops::softmax_last_dim`] with a backward.
///
/// # Errors
/// If `xs` is a scalar or not of floats.
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    ops::softmax_last_dim(xs)
}

/// [`candle_nn::ops::rms_norm`] of `xs` (.., n) with the gain `alpha` (n), with a backward.
///
/// # Errors
/// If the shapes do not fit.
pub fn rms_norm(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    ops::rms_norm(xs, alpha, eps)
}

/// [`candle_nn::ops::layer_norm`] of `xs` (.., n) with the gain `alpha` and the bias `beta` (n), with a
/// backward.
///
/// # Errors
/// If the shapes do not fit.
pub fn layer_norm(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    ops::layer_norm(xs, alpha, Some(beta), eps)
}

/// [`candle_nn::ops::silu`] with a fused backward.
///
/// # Errors
/// If `xs` is not of floats.
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    activation(xs, Activation::Silu)
}

/// [`candle_nn::ops::swiglu`] with a fused `silu`: `silu(a)·b` of the two halves of the last dimension.
///
/// # Errors
/// If the last dimension is odd.
pub fn swiglu(xs: &Tensor) -> Result<Tensor> {
    let halves = xs.chunk(2, candle_core::D::Minus1)?;
    match &halves[..] {
        [a, b] => silu(a)? * b,
        _ => candle_core::bail!("swiglu: the input {:?} has no two halves", xs.dims()),
    }
}

/// GELU with the tanh approximation, `Tensor::gelu`, with a fused backward. Not in candle_nn.
///
/// # Errors
/// If `xs` is not of floats.
pub fn gelu(xs: &Tensor) -> Result<Tensor> {
    activation(xs, Activation::Gelu)
}

/// GELU with the normal distribution, `Tensor::gelu_erf`, with a fused backward. Not in candle_nn.
///
/// # Errors
/// If `xs` is not of floats.
pub fn gelu_erf(xs: &Tensor) -> Result<Tensor> {
    activation(xs, Activation::GeluErf)
}
