//! The names of candle-transformers' `models::with_tracing`, without its spans: for copies of its models,
//! `pub use loralib::nn::with_tracing;` in the module above them.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

pub use super::conv::{conv2d, Conv2d};
pub use super::layer_norm::{layer_norm, LayerNorm};
pub use super::linear::{linear, linear_b, linear_no_bias, Linear};

impl Linear {
    /// [`Linear::new`], as candle-transformers' `with_tracing::Linear` names it.
    pub fn from_weights(weights: Tensor, bias: Option<Tensor>) -> Self {
        Self::new(weights, bias)
    }
}

/// [`nn::Embedding`](super::Embedding) with the constructors of candle-transformers'.
#[derive(Debug, Clone)]
pub struct Embedding(super::Embedding);

impl Embedding {
    /// A table of `num` rows of `dim` values from `vb`.
    ///
    /// # Errors
    /// If `vb` lacks the table or has it in another shape.
    pub fn new(num: usize, dim: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self(super::embedding(num, dim, vb)?))
    }

    /// A layer with `weights` (num, dim).
    ///
    /// # Errors
    /// If `weights` is not a matrix.
    pub fn from_weights(weights: Tensor) -> Result<Self> {
        let (_, dim) = weights.dims2()?;
        Ok(Self(super::Embedding::new(weights, dim)))
    }

    /// The base table (num, dim).
    pub fn embeddings(&self) -> &Tensor {
        self.0.embeddings()
    }
}

impl Module for Embedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.0.forward(ids)
    }
}

/// [`nn::RmsNorm`](super::RmsNorm) with the constructor of candle-transformers'.
#[derive(Debug, Clone)]
pub struct RmsNorm(super::RmsNorm);

impl RmsNorm {
    /// A gain (n) from `vb`.
    ///
    /// # Errors
    /// If `vb` lacks the gain or has it in another shape.
    pub fn new(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self(super::rms_norm(size, eps, vb)?))
    }

    /// The forward.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward_diff(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward_diff(x)
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}
