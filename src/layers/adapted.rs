//! What all adapted layers have in common: a weight with its update, its bias and its mode.

use super::weight::Weight;
use super::{LoraModule, Mode};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// A layer of kind `K` around a frozen base weight. Its kinds have names of their own:
/// [`Linear`](crate::Linear), [`MergedLinear`](crate::MergedLinear),
/// [`Embedding`](crate::Embedding), [`Conv1d`](crate::Conv1d), [`Conv2d`](crate::Conv2d),
/// [`Conv3d`](crate::Conv3d).
///
/// A clone shares the variables of the original, as candle's layers do, and has a mode of its own.
#[derive(Debug, Clone)]
pub struct Adapted<K> {
    pub(super) kind: K,
    pub(super) weight: Weight,
}

impl<K> Adapted<K> {
    /// The base weight, in the shape in which it is stored. No mode changes it.
    pub fn weight(&self) -> &Tensor {
        self.weight.base()
    }

    /// `W + ΔW` in the base's shape and dtype, rounded once, without a graph.
    ///
    /// # Errors
    /// When a value of it is not finite.
    pub fn merged_weight(&self) -> Result<Tensor> {
        self.weight.merged()
    }

    /// The bias, if the layer has one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.weight.bias()
    }

    /// The factor A of the update, in the shape that the layer's own page tells; `None` in a plain layer
    /// (r = 0).
    pub fn lora_a(&self) -> Option<&Tensor> {
        self.weight.update().map(|update| update.a())
    }

    /// The factor B of the update, likewise.
    pub fn lora_b(&self) -> Option<&Tensor> {
        self.weight.update().map(|update| update.b())
    }

    /// The factor of `B·A`: `lora_alpha / r`, with `rslora` `lora_alpha / √r`; 0 in a plain layer.
    pub fn scaling(&self) -> f64 {
        self.weight.update().map_or(0., |update| update.scaling())
    }

    /// Whether the layer runs with a merged copy of its weight. Never true of a plain layer.
    pub fn is_merged(&self) -> bool {
        self.weight.is_merged()
    }
}

impl<K> LoraModule for Adapted<K> {
    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.weight.set_mode(mode)
    }
}

/// The bias of a layer that is being wrapped: `vb`'s where that trains it, else the layer's own.
pub(super) fn wrapped_bias(bias: Option<&Tensor>, vb: &VarBuilder) -> Result<Option<Tensor>> {
    let Some(own) = bias else { return Ok(None) };
    if vb.contains_tensor("bias") {
        let trained =
            vb.get_with_hints_dtype(own.shape(), "bias", candle_nn::Init::default(), own.dtype())?;
        if trained.is_variable() {
            return Ok(Some(trained));
        }
    }
    Ok(Some(own.clone()))
}
