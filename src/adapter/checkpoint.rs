//! Activation checkpointing.

use super::Adapter;
use crate::ops;
use crate::utils::names::is_within;
use candle_core::{bail, Result, Tensor};
use std::sync::atomic::{AtomicBool, Ordering};

impl Adapter {
    /// `segment(x)`, of which the graph keeps `x` and the output alone: the backward runs the segment again. This
    /// is `torch.utils.checkpoint`: with one segment for each transformer layer, the activations of a step are
    /// those of one layer, and a step takes about one more forward.
    ///
    /// `module` is the path of the segment's part of the model, such as `model.layers.3`: the gradients of the
    /// variables in it arrive in the outer `backward`. The segment must use no variables outside of it, and give
    /// the same output again; dropout needs a [`seed`](Self::seed), and draws the same masks.
    ///
    /// ```
    /// # fn main() -> loralib::Result<()> {
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use loralib::{nn as candle_nn, Adapter, LoraConfig};
    /// # let base = candle_nn::VarBuilder::from_varmap(&candle_nn::VarMap::new(), DType::F32, &Device::Cpu);
    /// let cfg = LoraConfig { r: 2, ..Default::default() };
    /// let adapter = Adapter::new(cfg).targets(["fc"]);
    /// let vb = adapter.var_builder(base);
    /// let layer = candle_nn::linear(4, 4, vb.pp("layers.0.fc"))?;
    ///
    /// let x = Tensor::ones((2, 4), DType::F32, &Device::Cpu)?;
    /// let y = adapter.checkpoint("layers.0", &x, move |x| layer.forward(x)?.tanh())?;
    /// let grads = y.sum_all()?.backward()?;
    /// assert!(loralib::missing_grads(adapter.var_map(), &grads).is_empty());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of the segment; and if the adapter has dropout without a seed.
    pub fn checkpoint(
        &self,
        module: &str,
        x: &Tensor,
        segment: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let vars = self.named_vars()?.into_iter().filter(|(name, _)| is_within(name, module));
        let vars = vars.map(|(_, var)| var).collect();
        let Some(masks) = self.options.dropout.clone() else {
            if self.options.config.lora.lora_dropout > 0. {
                bail!("checkpoint: lora_dropout needs a seed, so that masks can be drawn again")
            }
            return ops::checkpoint(x, vars, Box::new(segment));
        };
        let (first, start) = (AtomicBool::new(true), masks.position());
        let segment = move |x: &Tensor| {
            if first.swap(false, Ordering::Relaxed) {
                return segment(x);
            }
            let after = masks.position();
            masks.seek(start);
            let y = segment(x);
            masks.seek(after);
            y
        };
        ops::checkpoint(x, vars, Box::new(segment))
    }
}
