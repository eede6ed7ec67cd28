//! [`mod@candle_nn::linear`], adapted by name.

use crate::layers::{
    self, adapt_linear, adapt_merged_linear, claims, LayerKind, Placement, Total, Weight,
};
use candle_core::{bail, Module, Result, Tensor};
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
        let adapted = claims::take(&weight).and_then(|claim| {
            claim.adapt(&weight, LayerKind::Linear, &|cfg, kind, vb| {
                if cfg.fan_in_fan_out {
                    bail!("fan_in_fan_out is set, but candle_nn's weights are (out, in)")
                }
                match kind.splits(Total::All(weight.dim(0)?)) {
                    Some(splits) => adapt_merged_linear(&weight, &splits, cfg, vb),
                    None if *kind == LayerKind::Linear => adapt_linear(&weight, cfg, vb),
                    None => bail!("its weight {:?} is not that of a {kind:?}", weight.dims()),
                }
                .map(|weight| weight.with_bias(bias.clone()))
            })
        });
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
    let base = candle_nn::linear_b(in_dim, out_dim, bias, vb)?;
    Ok(Linear::new(base.weight().clone(), base.bias().cloned()))
}
