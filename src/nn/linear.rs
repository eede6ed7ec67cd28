//! [`mod@candle_nn::linear`], adapted by name.

use crate::layers::binding::target::target_of;
use crate::layers::{self, LayerKind, Placement, Weight};
use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use std::ops::Deref;

/// [`candle_nn::Linear`] with an adapter if its weight is a target of an [`Adapter`](crate::Adapter):
/// (.., in) to (.., out). It dereferences to [`loralib::Linear`](crate::Linear), which has the factors and
/// the mode.
#[derive(Debug, Clone)]
pub struct Linear(layers::Linear);

impl Linear {
    /// A layer with `weight` (out, in) and `bias` (out). An adaptation that fails is reported by
    /// [`Adapter::check`](crate::Adapter::check).
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        let adapted = target_of(&weight)
            .and_then(|module| module.adapt(&weight, bias.as_ref(), LayerKind::Linear));
        let weight = adapted.unwrap_or_else(|| Weight::plain(weight, bias, Placement::AsIs));
        Self(layers::Linear::from_parts(layers::LinearKind::default(), weight))
    }

    /// The base weight (out, in).
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// The bias (out).
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }
}

impl Deref for Linear {
    type Target = layers::Linear;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

/// [`candle_nn::linear()`]: a layer with a bias from `vb`.
///
/// # Errors
/// If `vb` lacks a tensor or has it in another shape.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(in_dim, out_dim, true, vb)
}

/// [`candle_nn::linear_no_bias`].
///
/// # Errors
/// As [`linear()`].
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(in_dim, out_dim, false, vb)
}

/// [`candle_nn::linear_b`].
///
/// # Errors
/// As [`linear()`].
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    // The module is bound to the weight as long as the last `VarBuilder` lives.
    let base = candle_nn::linear_b(in_dim, out_dim, bias, vb.clone())?;
    Ok(Linear::new(base.weight().clone(), base.bias().cloned()))
}
