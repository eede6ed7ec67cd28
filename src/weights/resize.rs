//! Adapters of another rank.

use super::layer::LayerWeights;
use super::lora_weights::LoraWeights;
use super::products::{Nearest, Products};
use super::uniform::common_rank_alpha;
use crate::layers::Part;
use crate::ops::svd_of_product;
use crate::{Error, Result};
use candle_core::{bail, Tensor};
use std::collections::BTreeMap;

/// What [`LoraWeights::resized`] gives.
#[derive(Debug, Clone)]
pub struct Resized {
    /// The adapter.
    pub weights: LoraWeights,
    /// By the path of each layer the share of ΔW that is kept: of its squared Frobenius norm, at most 1. Fused experts have a
    /// path each, such as `experts.0.gate_up_proj`.
    pub kept: BTreeMap<String, f64>,
}

impl LoraWeights {
    /// The adapter with the nearest update of rank `rank` in each layer, by a singular value decomposition of `B·A`. What
    /// else it has, biases, magnitudes and whole modules, stays as it is. ΔW itself is never in memory.
    ///
    /// The scaling of each layer stays, so that its `lora_alpha` changes with its rank. A layer of a lower rank gets zeros, a
    /// merged linear layer has `rank` in each split. Half-precision factors become F32. It needs the feature `faer`.
    ///
    /// ```
    /// # fn main() -> loralib::Result<()> {
    /// use candle_core::{Device, Tensor};
    /// use loralib::{LoraConfig, LoraWeights};
    /// let tensors = [
    ///     ("q.lora_A".to_owned(), Tensor::randn(0f32, 1., (4, 6), &Device::Cpu)?),
    ///     ("q.lora_B".to_owned(), Tensor::randn(0f32, 1., (5, 4), &Device::Cpu)?),
    /// ];
    /// let adapter = LoraWeights::new(LoraConfig { r: 4, ..Default::default() }, tensors.into())?;
    /// let resized = adapter.resized(2)?;
    /// assert_eq!(resized.weights.state_dict()["q.lora_A"].dims(), [2, 6]);
    /// assert!(resized.kept["q"] > 0.5 && resized.kept["q"] < 1.);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If `rank` is 0 or above a side of a layer's matrix, a layer is a parameter other than experts with a
    /// gate, or a convolution with groups, or a value is not finite.
    pub fn resized(&self, rank: usize) -> Result<Resized> {
        // The experts of fused parameters one by one.
        let (own, parameters) = self.joined()?.into_owned().with_unfused()?;
        let (mut weights, mut kept) = (own.clone(), BTreeMap::new());
        let rslora = own.options.lora.rslora;
        for (path, layer) in &own.layers {
            let of_layer = || -> candle_core::Result<_> {
                let products = Products::of(layer)?;
                let nearest = |[a, b]: &[Tensor; 2]| {
                    let most = a.dim(1)?.min(b.dim(0)?);
                    if rank == 0 || rank > most {
                        bail!("its rank cannot be {rank}: expected 1 to {most}")
                    }
                    Nearest::of(&svd_of_product(b, a)?, rank)
                };
                let nearest = products.products.iter().map(nearest);
                let nearest = nearest.collect::<candle_core::Result<Vec<_>>>()?;
                let sum = |of: fn(&Nearest) -> f64| nearest.iter().map(of).sum::<f64>();
                let (is, was) = (sum(|own| own.kept), sum(|own| own.all));
                let resized = nearest.into_iter().map(|own| own.product).collect();
                let scaling = layer.options(&own.options.lora).scaling();
                let new = products.with(resized).into_layer(layer, scaling, rslora)?;
                Ok((new, if was > 0. { is / was } else { 1. }))
            };
            let (new, share) = of_layer().map_err(|e| Error::tensor(Part::A.at(path), e))?;
            let (magnitude, bias) = (layer.magnitude.clone(), layer.bias.clone());
            weights.layers.insert(path.clone(), LayerWeights { magnitude, bias, ..new });
            kept.insert(path.clone(), share);
        }
        let own = weights.layers.values().map(|layer| (layer.r, layer.lora_alpha));
        if let Some(common) = common_rank_alpha(&weights.options.lora, own) {
            (weights.options.lora.r, weights.options.lora.lora_alpha) = common;
        }
        let weights =
            weights.checked()?.with_fused(|path| parameters.iter().any(|own| own == path))?;
        Ok(Resized { weights, kept })
    }
}
