//! A `VarBuilder` over a base with an adapter merged into it, for any candle model.

use super::Adapter;
use crate::files::StateDict;
use crate::layers::{dequantized, Part};
use crate::merge::Plan;
use crate::weights::LoraWeights;
use crate::Result;
use candle_core::{bail, DType, Device, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;

impl Adapter {
    /// A `VarBuilder` that gives `W + ΔW` for the weights of the adapted layers, and the adapter's biases and
    /// modules in place of the base's: for a model that does not know this crate, such as
    /// candle-transformers'.
    ///
    /// A weight is merged when the model asks for it, in F32, and rounded to the dtype that the model asks for, in
    /// which the base is read. `base` may be mapped, sharded or in memory; beside the model, one tensor and its merged
    /// copy are in memory at a time. A quantised base is dequantised, every weight of it.
    ///
    /// A head that is tied to an adapted embedding computes with the merged table here, and with the base's table
    /// in a model on [`var_builder`](Self::var_builder): adapt tied tables only if the model unties the head.
    ///
    /// # Errors
    /// If the base lacks the weight of an adapted layer, or one of its factors is missing. A weight that does
    /// not fit its factors, or a merged value that is not finite, is an error when the model asks for it.
    pub fn merged<'a>(&self, base: VarBuilder<'a>) -> Result<VarBuilder<'a>> {
        let (dtype, device) = (base.dtype(), base.device().clone());
        let mut adapter = self.state_dict()?;
        adapter.extend(self.options.frozen.clone());
        let exists = |name: &str| base.contains_tensor(name) || adapter.contains_key(name);
        let dims = |name: &str| Some(base.get_unchecked(name).ok()?.dims().to_vec());
        let weights = LoraWeights::new(self.config(), adapter.clone())?;
        let plan = Plan::new(&weights, exists, dims)?;
        Ok(VarBuilder::from_backend(Box::new(Merged { base, adapter, plan }), dtype, device))
    }
}

struct Merged<'a> {
    base: VarBuilder<'a>,
    adapter: StateDict,
    plan: Plan,
}

impl Merged<'_> {
    /// The adapter's own tensor of this name, if it has one.
    fn own(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Option<Tensor>> {
        let own = self.adapter.get(name).map(|own| own.to_device(device)?.to_dtype(dtype));
        own.transpose()
    }

    /// `tensor` with the adapter's changes.
    fn merge(&self, name: &str, tensor: Tensor) -> candle_core::Result<Tensor> {
        Ok(self.plan.apply(name, &tensor)?.unwrap_or(tensor))
    }
}

impl SimpleBackend for Merged<'_> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        hint: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let weight = match self.own(name, dtype, device)? {
            Some(own) if own.shape() != &shape => {
                bail!("the adapter has {name:?} as {:?}, expected {shape:?}", own.shape())
            }
            Some(own) => own,
            None => {
                let base = self.base.clone().set_device(device.clone());
                dequantized(base.get_with_hints_dtype(shape, name, hint, dtype)?)?
            }
        };
        self.merge(name, weight)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let weight = match self.own(name, dtype, device)? {
            Some(own) => own,
            None => {
                let base = self.base.clone().set_device(device.clone());
                dequantized(base.get_unchecked_dtype(name, dtype)?)?
            }
        };
        self.merge(name, weight)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        !Part::parse(name).1.is_adapter()
            && (self.adapter.contains_key(name) || self.base.contains_tensor(name))
    }
}
