//! What all adapted layers share: a weight with its update, its bias and its mode.

use super::kind::LayerKind;
use super::mode::{LoraModule, Mode};
use super::weight::Weight;
use candle_core::quantized::QTensor;
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// A layer of kind `K` around a frozen base weight: [`Linear`](crate::Linear),
/// [`MergedLinear`](crate::MergedLinear), [`Embedding`](crate::Embedding), [`Conv1d`](crate::Conv1d),
/// [`Conv2d`](crate::Conv2d) or [`Conv3d`](crate::Conv3d).
///
/// A clone shares the variables of the original, as clones of candle's layers do, and has a mode of its
/// own.
#[derive(Debug, Clone)]
pub struct Adapted<K> {
    pub(super) kind: K,
    pub(super) weight: Weight,
}

/// What distinguishes the layers: how they store their weight.
pub trait Kind: sealed::Sealed {
    /// The kind as a value, for an [`AdapterConfig`](crate::adapter::AdapterConfig).
    fn layer_kind(&self) -> LayerKind;
}

pub(super) mod sealed {
    pub trait Sealed {}
}

impl<K> Adapted<K> {
    pub(crate) fn from_parts(kind: K, weight: Weight) -> Self {
        Self { kind, weight }
    }
}

impl<K: Kind> Adapted<K> {
    /// The kind of the layer, for an [`AdapterConfig`](crate::adapter::AdapterConfig).
    pub fn kind(&self) -> LayerKind {
        self.kind.layer_kind()
    }
}

impl<K> Adapted<K> {
    /// The base weight as it is stored. It is the same in every mode.
    ///
    /// For a quantised base it is a placeholder of the weight's shape whose values are NaN: it serves to build
    /// another layer on the same weight, such as a tied head. See
    /// [`quantized_weight`](Self::quantized_weight).
    pub fn weight(&self) -> &Tensor {
        self.weight.base().tensor()
    }

    /// The base weight (out, in), if it is quantised.
    pub fn quantized_weight(&self) -> Option<&Arc<QTensor>> {
        self.weight.base().blocks()
    }

    /// The merged weight, `W + ΔW` or with DoRA `m ∘ (W + ΔW)/‖W + ΔW‖`, in the base's shape and dtype, rounded
    /// once, without a graph. A quantised base is dequantised.
    ///
    /// # Errors
    /// If a merged value is not finite.
    pub fn merged_weight(&self) -> Result<Tensor> {
        self.weight.merged()
    }

    /// The bias, if the layer has one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.weight.bias()
    }

    /// `lora_A`, e.g. (r, in_features) for [`Linear`](crate::Linear). `None` if r = 0.
    pub fn lora_a(&self) -> Option<&Tensor> {
        self.weight.update().map(|update| update.trained()[0])
    }

    /// `lora_B`, e.g. (out_features, r) for [`Linear`](crate::Linear). `None` if r = 0.
    pub fn lora_b(&self) -> Option<&Tensor> {
        self.weight.update().map(|update| update.trained()[1])
    }

    /// `lora_magnitude_vector` (out). `None` without [`use_dora`](crate::LoraConfig::use_dora), or if r = 0.
    pub fn lora_magnitude_vector(&self) -> Option<&Tensor> {
        self.weight.update()?.magnitude().map(|magnitude| &magnitude.m)
    }

    /// The tensors with a graph that a forward computes with.
    pub(crate) fn tracked(&self) -> Vec<Tensor> {
        self.weight.tracked()
    }

    /// The scaling of `B·A`: `lora_alpha / r`, or `lora_alpha / √r` with `rslora`; 0 if r = 0.
    pub fn scaling(&self) -> f64 {
        self.weight.update().map_or(0., |update| update.scaling())
    }

    /// The mode that was last set; [`Mode::Train`] in a new layer.
    pub fn mode(&self) -> Mode {
        self.weight.mode()
    }

    /// Whether the layer computes with a merged copy of its weight. Always false if r = 0 or the base is
    /// quantised.
    pub fn is_merged(&self) -> bool {
        self.weight.is_merged()
    }
}

impl<K> LoraModule for Adapted<K> {
    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.weight.set_mode(mode)
    }
}

/// The bias of a layer that is wrapped: `vb`'s if `vb` trains it, else the layer's own.
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
