//! A `VarBuilder` over a base with an adapter merged into it, for any candle model.

use super::record::Record;
use super::state::MergedModel;
use super::Adapter;
use crate::base::quantized::Dense;
use crate::base::source::{from_source, Source, Wanted};
use crate::files::StateDict;
use crate::layers::Part;
use crate::merge::{Additions, Plan};
use crate::weights::{is_equal, untied_table};
use crate::Result;
use candle_core::Tensor;
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

impl Adapter {
    /// A `VarBuilder` that gives `W + ΔW` for the weights of the adapted layers, and the adapter's biases and
    /// modules in place of the base's: for a model that does not know this crate, such as
    /// candle-transformers'.
    ///
    /// A weight is merged when the model asks for it, in F32, and rounded to the dtype that the model asks for, in
    /// which the base is read. `base` may be mapped, sharded or in memory; beside the model, one tensor and its merged
    /// copy are in memory at a time. A quantised base is dequantised, every weight of it.
    ///
    /// If the base ties its head to the embeddings and the adapter changes one of the two alone, the head is a tensor of
    /// its own here, such as `lm_head.weight`: the model has to read it (`tie_word_embeddings: false`).
    /// [`check`](Self::check) tells whether the model has read all that the adapter changes.
    ///
    /// # Errors
    /// If the base lacks the weight of an adapted layer, or one of its factors is missing. A weight that does
    /// not fit its factors, or a merged value that is not finite, is an error when the model asks for it.
    pub fn merged<'a>(&self, base: VarBuilder<'a>) -> Result<VarBuilder<'a>> {
        let (dtype, device) = (base.dtype(), base.device().clone());
        let exists = |name: &str| base.contains_tensor(name);
        let dims = |name: &str| Some(base.get_unchecked(name).ok()?.dims().to_vec());
        let weights = self.weights()?;
        let plan = Plan::new(&weights, exists, dims, Additions::All)?;
        let adapter = weights.state_dict();
        let record = Arc::<Record>::default();
        let mut changed: Vec<_> = plan.changed().into_iter().map(str::to_owned).collect();
        // Some bases have a tied head a second time, and a model that ties it would compute with the changed table.
        for (head, table) in plan.heads_beside(|name| base.contains_tensor(name)) {
            let read = |name: &str| Dense(base.clone()).tensor(name, &any(&base));
            if is_equal(&read(&head)?, &read(&table)?)? {
                changed.push(head);
            }
        }
        self.state().merged = Some(MergedModel { record: record.clone(), changed });
        Ok(from_source(Merged { base: Dense(base), adapter, plan, record }, dtype, &device))
    }
}

/// A tensor of any shape, as the base gives it.
fn any<'a>(base: &'a VarBuilder) -> Wanted<'a> {
    Wanted { shape: None, init: Init::default(), dtype: base.dtype(), device: base.device() }
}

struct Merged<'a> {
    base: Dense<VarBuilder<'a>>,
    adapter: StateDict,
    plan: Plan,
    record: Arc<Record>,
}

impl Source for Merged<'_> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let table = untied_table(name, |name| self.has(name));
        let tensor = match (self.adapter.get(name), self.plan.table(name), table) {
            (Some(own), ..) => wanted.convert(name, own)?,
            (None, Some(table), _) => self.base.tensor(table, wanted)?,
            // A head that the merged model ties, too.
            (None, None, Some(table)) => self.tensor(&table, wanted)?,
            (None, None, None) => self.base.tensor(name, wanted)?,
        };
        let merged = self.plan.apply(name, &tensor)?.unwrap_or(tensor);
        self.record.read(name, &merged);
        Ok(merged)
    }

    fn has(&self, name: &str) -> bool {
        !Part::parse(name).1.is_adapter()
            && (self.adapter.contains_key(name)
                || self.plan.table(name).is_some()
                || self.base.has(name))
    }
}
