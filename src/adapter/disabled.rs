//! The base of a model with an adapter.

use super::Adapter;
use super::Choice;
use crate::layers::binding::active::{Activations, Active};
use crate::layers::Part;
use crate::utils::variables;
use crate::{Error, Result};

impl Adapter {
    /// Runs `f`, in which the model computes without this adapter, as by PEFT's `disable_adapter`: the reference model of
    /// DPO. The mode stays. On a model of [`Adapters`](crate::Adapters) to which it was added, whatever is chosen there
    /// counts without it. It is the [`run`](Choice::run) of [`choice_disabled`](Self::choice_disabled), which tells what holds
    /// for threads.
    ///
    /// ```
    /// # fn main() -> loralib::Result<()> {
    /// # use candle_core::{DType, Device, Module, Tensor};
    /// # use loralib::{nn as candle_nn, Adapter, LoraConfig};
    /// # let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["fc"]);
    /// # let base = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// # let model = candle_nn::linear(4, 4, adapter.var_builder(base).pp("fc"))?;
    /// # let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
    /// let policy = model.forward(&x)?;
    /// let reference = adapter.disabled(|| model.forward(&x))?.detach();
    /// # let _ = (policy, reference); Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of `f`; and if the adapter trains biases or modules, in whose place the base's own are not kept.
    pub fn disabled<T: Send, E: From<Error> + Send>(
        &self,
        f: impl FnOnce() -> std::result::Result<T, E> + Send,
    ) -> std::result::Result<T, E> {
        self.choice_disabled()?.run(f)
    }

    /// A model without this adapter, to be run in any thread.
    ///
    /// # Errors
    /// If the adapter trains biases or modules, in whose place the base's own are not kept.
    pub fn choice_disabled(&self) -> Result<Choice> {
        let others =
            variables(&self.vars).into_keys().find(|name| !Part::parse(name).1.is_adapter());
        if let Some(name) = others {
            let reason = "the adapter trains it, and the base's own is not kept: for a model without the adapter, \
                          build one on the base";
            return Err(Error::tensor(name, reason));
        }
        Ok(Choice(Activations::of(&self.record.scope, Active::Sum(vec![]))))
    }
}
