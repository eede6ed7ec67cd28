//! Activation checkpointing.

use super::Adapter;
use crate::layers::binding::active::Activations;
use crate::ops::{self, SegmentVars};
use candle_core::{bail, Result, Tensor};
use std::sync::atomic::{AtomicBool, Ordering};

impl Adapter {
    /// `segment(x)`, of which the graph keeps `x` and the output alone: the backward runs the segment again. This
    /// is `torch.utils.checkpoint`: with one segment for each transformer layer, the activations of a step are
    /// those of one layer, and a step takes about one more forward.
    ///
    /// `module` is the path of the segment's part of the model, such as `model.layers.3`, or empty for all of it: the
    /// gradients of this adapter's variables in it arrive in the outer `backward`. The segment owns what it uses (a
    /// clone of the layer, or an `Arc`). It uses all of these variables and no others, and gives the same output
    /// again: the layers' dropout needs a [`seed`](Self::seed), and draws the same masks; other dropout has no place
    /// in a segment. One thread at a time runs a model with dropout, or with a batch norm that is trained as a whole, whose
    /// running statistics move once. The segment runs again with the adapter that
    /// [`Adapters`](crate::Adapters) had chosen.
    ///
    /// ```
    /// # fn main() -> loralib::Result<()> {
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use loralib::{nn as candle_nn, Adapter, LoraConfig};
    /// # let base = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
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
    /// Those of the segment; if the adapter has dropout without a seed; and if the segment uses variables but none is
    /// in the module. In the backward: if the segment gives another output (compared on the CPU), uses a variable
    /// outside of the module or of another adapter that was chosen, or cuts the graph before its input or a variable
    /// of the module. A variable of the model's own gets no gradient, without an error.
    pub fn checkpoint(
        &self,
        module: &str,
        x: &Tensor,
        segment: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let within = |name: &str| match name.strip_prefix(module) {
            Some(rest) => module.is_empty() || rest.is_empty() || rest.starts_with('.'),
            None => false,
        };
        let named = self.named_vars()?;
        // The backward comes after the closure of `Adapters::with`.
        let active = Activations::current();
        let mut foreign = active.variables();
        foreign.retain(|(_, tensor)| named.values().all(|own| own.id() != tensor.id()));
        let segment = move |x: &Tensor| active.clone().run(|| segment(x));
        let (inside, outside) = named.into_iter().partition(|(name, _)| within(name));
        let vars = SegmentVars { module: module.to_owned(), inside, outside, foreign };
        let masks = self.options.dropout.clone();
        if masks.is_none() && self.options.config.lora.lora_dropout > 0. {
            bail!("checkpoint: lora_dropout needs a seed, so that masks can be drawn again")
        }
        // The forward has moved the statistics of batch norms; the backward does not move them again.
        let statistics = self.statistics();
        let start = masks.as_ref().map(|masks| masks.position());
        let first = AtomicBool::new(true);
        let segment = move |x: &Tensor| {
            if first.swap(false, Ordering::Relaxed) {
                return segment(x);
            }
            let after = masks.as_ref().map(|masks| masks.position());
            let seek = |position| masks.as_ref().zip(position).map(|(masks, at)| masks.seek(at));
            let before = statistics.iter().map(|var| var.copy()).collect::<Result<Vec<_>>>()?;
            seek(start);
            let y = segment(x);
            seek(after);
            statistics.iter().zip(&before).try_for_each(|(var, before)| var.set(before))?;
            y
        };
        ops::recompute(x, vars, Box::new(segment))
    }
}
