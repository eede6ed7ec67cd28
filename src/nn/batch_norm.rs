//! Batch normalisation over a frozen base, with candle_nn's names.

use candle_core::{ModuleT, Result, Tensor};
use candle_nn::VarBuilder;
use std::ops::Deref;

pub use candle_nn::batch_norm::BatchNormConfig;

/// [`candle_nn::BatchNorm`], whose running statistics change only if they are variables, as in a module that is trained
/// and saved as a whole.
///
/// Those of a frozen base belong to no adapter: candle's would move them in training, and a model with the saved adapter
/// would be another. So training too normalises by them, as is usual when a network is fine-tuned.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    inner: candle_nn::BatchNorm,
    is_frozen: bool,
}

impl BatchNorm {
    /// See [`candle_nn::BatchNorm::new`].
    pub fn new(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
    ) -> Result<Self> {
        Self::new_with_momentum(num_features, running_mean, running_var, weight, bias, eps, 0.1)
    }

    /// See [`candle_nn::BatchNorm::new_no_bias`].
    pub fn new_no_bias(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
    ) -> Result<Self> {
        Self::new_no_bias_with_momentum(num_features, running_mean, running_var, eps, 0.1)
    }

    /// See [`candle_nn::BatchNorm::new_with_momentum`].
    pub fn new_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let is_frozen = is_frozen(&running_mean, &running_var);
        let (n, mean, var) = (num_features, running_mean, running_var);
        let inner =
            candle_nn::BatchNorm::new_with_momentum(n, mean, var, weight, bias, eps, momentum)?;
        Ok(Self { inner, is_frozen })
    }

    /// See [`candle_nn::BatchNorm::new_no_bias_with_momentum`].
    pub fn new_no_bias_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let is_frozen = is_frozen(&running_mean, &running_var);
        let (n, mean, var) = (num_features, running_mean, running_var);
        let inner = candle_nn::BatchNorm::new_no_bias_with_momentum(n, mean, var, eps, momentum)?;
        Ok(Self { inner, is_frozen })
    }

    /// Normalises by the statistics of the batch and moves the running ones, or by those if they are frozen.
    pub fn forward_train(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_t(x, true)
    }
}

impl Deref for BatchNorm {
    type Target = candle_nn::BatchNorm;

    fn deref(&self) -> &Self::Target {
        &self.inner
    }
}

impl ModuleT for BatchNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.inner.forward_t(x, train && !self.is_frozen)
    }
}

fn is_frozen(running_mean: &Tensor, running_var: &Tensor) -> bool {
    !(running_mean.is_variable() && running_var.is_variable())
}

/// See [`candle_nn::batch_norm()`].
///
/// # Errors
/// If `vb` lacks a tensor, or one has another shape; and if `eps` is negative.
pub fn batch_norm<C: Into<BatchNormConfig>>(
    num_features: usize,
    config: C,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    // candle's makes variables of them.
    let frozen =
        |name: &str| Ok::<_, candle_core::Error>(!vb.get(num_features, name)?.is_variable());
    let inner = candle_nn::batch_norm(num_features, config, vb.clone())?;
    let is_frozen = frozen("running_mean")? || frozen("running_var")?;
    Ok(BatchNorm { inner, is_frozen })
}
