//! [`mod@candle_nn::layer_norm`] with a backward.

use crate::ops;
use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

pub use candle_nn::layer_norm::LayerNormConfig;

/// [`candle_nn::LayerNorm`] with a backward: (.., n) to (.., n).
#[derive(Debug, Clone)]
pub struct LayerNorm(candle_nn::LayerNorm);

impl LayerNorm {
    /// A layer norm with a gain and a bias (n).
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self(candle_nn::LayerNorm::new(weight, bias, eps))
    }

    /// A layer norm with a gain (n).
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self(candle_nn::LayerNorm::new_no_bias(weight, eps))
    }

    /// An RMS norm with a gain (n).
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self(candle_nn::LayerNorm::rms_norm(weight, eps))
    }

    /// The gain.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// Whether the mean is subtracted.
    pub fn remove_mean(&self) -> bool {
        self.0.remove_mean()
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let eps = self.eps() as f32;
        if self.bias().is_none() && self.weight().rank() != 1 {
            // A gain that broadcasts to x, as MMDiT's: composed by candle, with gradients.
            return self.0.forward(x);
        }
        match (self.remove_mean(), self.bias()) {
            (true, bias) => ops::layer_norm(x, self.weight(), bias, eps),
            (false, None) => ops::rms_norm(x, self.weight(), eps),
            // Composed by candle, with gradients.
            (false, Some(_)) => self.0.forward(x),
        }
    }
}

/// [`candle_nn::layer_norm()`].
///
/// # Errors
/// If `vb` lacks a tensor or has it in another shape.
pub fn layer_norm<C: Into<LayerNormConfig>>(
    size: usize,
    config: C,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    Ok(LayerNorm(candle_nn::layer_norm(size, config, vb)?))
}

/// [`candle_nn::layer_norm_no_bias`].
///
/// # Errors
/// As [`layer_norm()`].
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    Ok(LayerNorm(candle_nn::layer_norm_no_bias(size, eps, vb)?))
}

/// [`candle_nn::RmsNorm`] with a backward: (.., n) to (.., n).
#[derive(Debug, Clone)]
pub struct RmsNorm(LayerNorm);

impl RmsNorm {
    /// An RMS norm with a gain (n).
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// The layer norm without a mean that this is.
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// The gain.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// The forward; in candle_nn this one has a backward, and `forward` has none.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

/// [`candle_nn::rms_norm`].
///
/// # Errors
/// As [`layer_norm()`].
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    Ok(RmsNorm(LayerNorm(candle_nn::rms_norm(size, eps, vb)?.into_inner())))
}
