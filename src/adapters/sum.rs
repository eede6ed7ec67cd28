//! The weighted sum of adapters as one adapter.

use super::{Adapters, WeightedAdapters};
use crate::adapter::Adapter;
use crate::files::StateDict;
use crate::layers::{LayerKind, Part, Total};
use crate::ops::{weighted_sum, LowRank};
use crate::weights::{AdapterConfig, LayerConfig, LoraWeights};
use crate::Result;
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The summands of a layer.
#[derive(Default)]
struct Layer {
    updates: Vec<(LowRank, f64)>,
    kind: Option<LayerKind>,
    /// The sum of their `r`.
    r: usize,
    outputs: usize,
}

impl Adapters {
    /// The weighted sum of some adapters as one whose rank is the sum of theirs, with copies of their present
    /// values: to [merge](Adapter::merged), to save, or to add. It is like a [loaded](Adapter::load) adapter.
    ///
    /// # Errors
    /// If there is no adapter of a name, or none is named, or one twice; if a strength is not finite; and if an
    /// adapter has `use_dora`.
    pub fn sum(&self, adapters: impl Into<WeightedAdapters>) -> Result<Adapter> {
        let mut layers = BTreeMap::<String, Layer>::new();
        for (name, added, strength) in self.named(&adapters.into())? {
            added.refuse_dora(name)?;
            let config = added.adapter.config();
            for (path, update) in added.updates.iter() {
                let layer = layers.entry(path.clone()).or_default();
                layer.add(update, strength, &config, path)?;
            }
        }
        let (mut config, mut tensors) = (AdapterConfig::default(), StateDict::new());
        for (path, layer) in layers {
            let (a, b, options) = layer.sum()?;
            tensors.extend([(Part::A.at(&path), a), (Part::B.at(&path), b)]);
            config.lora.r = config.lora.r.max(options.r.unwrap_or_default());
            config.layers.insert(path, options);
        }
        // A scaling of 1, as that of each layer.
        config.lora.lora_alpha = config.lora.r as f64;
        Adapter::from_weights(&LoraWeights::new(config, tensors)?)
    }
}

impl Layer {
    fn add(
        &mut self,
        update: &LowRank,
        strength: f64,
        config: &AdapterConfig,
        path: &str,
    ) -> Result<()> {
        let (kind, rows) = (config.kind(path), update.b().dim(0)?);
        let splits = kind.and_then(|kind| kind.splits(Total::Enabled(rows)));
        let outputs = splits.map_or(rows, |splits| splits.iter().map(|(size, _)| size).sum());
        self.outputs = self.outputs.max(outputs);
        self.r += config.lora_config(path).r;
        // The sum of fused projections is that of linear layers.
        let fused = kind.is_none_or(LayerKind::is_linear);
        self.kind = if fused { Some(LayerKind::Linear) } else { kind.cloned() };
        self.updates.push((update.detached(), strength));
        Ok(())
    }

    /// A, B and the options.
    fn sum(self) -> Result<(Tensor, Tensor, LayerConfig)> {
        let sum = weighted_sum(&self.updates)?;
        let b = sum.b().pad_with_zeros(0, 0, self.outputs - sum.b().dim(0)?)?;
        let r = match self.kind {
            // Fused projections have one r, and several times as many rows.
            Some(LayerKind::Linear) => sum.a().dim(0)?,
            _ => self.r,
        };
        let options = LayerConfig {
            kind: self.kind,
            r: Some(r),
            lora_alpha: Some(r as f64),
            ..Default::default()
        };
        match (sum.kernel_dims(), sum.trained()) {
            (Some(_), [a, b]) => Ok((a.clone(), b.clone(), options)),
            (None, [a, _]) => Ok((a.clone(), b, options)),
        }
    }
}
