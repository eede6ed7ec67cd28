//! The `VarBuilder` of an adapter, or of a set of adapters: it records what a model reads, and binds its modules to
//! the weights that it gives.

use super::merged_only::MergedOnly;
use super::record::Record;
use super::target::{AdapterParts, Target};
use crate::base::source::{from_source, Source, Wanted};
use crate::base::{var_builder, var_builder_with};
use crate::layers::binding::target::TargetWeights;
use crate::layers::Part;
use crate::weights::Bias;
use crate::Result;
use candle_core::Tensor;
use candle_nn::{VarBuilder, VarMap};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

/// `base` for a model whose layers the adapter adapts or, without one, the adapters of a set. Trainable parameters
/// become variables of the adapter.
pub(crate) fn recorded<'a>(
    base: VarBuilder<'a>,
    record: Arc<Record>,
    adapter: Option<AdapterParts>,
) -> VarBuilder<'a> {
    let (dtype, device) = (base.dtype(), base.device().clone());
    let (base, merged_only) = match &adapter {
        None => (var_builder(base, &VarMap::new(), Bias::None), MergedOnly::default()),
        Some(AdapterParts { options, vars, .. }) => {
            let selects = {
                let options = options.clone();
                move |path: &str| options.selects(path)
            };
            let vb = var_builder_with(base, vars, &options.config, selects);
            (options.seeded(vb), MergedOnly::new(&options.config, vars))
        }
    };
    let weights = TargetWeights::default();
    from_source(Recorded { base, merged_only, record, adapter, weights }, dtype, &device)
}

struct Recorded<'a> {
    base: VarBuilder<'a>,
    merged_only: MergedOnly,
    record: Arc<Record>,
    adapter: Option<AdapterParts>,
    weights: TargetWeights,
}

impl Source for Recorded<'_> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        self.merged_only.refuse(name)?;
        // A loaded adapter may have a table in place of the base's.
        let own = self.adapter.as_ref().and_then(|adapter| adapter.options.frozen.get(name));
        let tensor = match own {
            Some(own) => wanted.convert(name, own)?,
            None => self.base.tensor(name, wanted)?,
        };
        self.record.read(name, &tensor);
        let (path, part) = Part::parse(name);
        // A variable is of a module that is trained as a whole: it stays itself, for optimizers to find.
        if part != Part::Base("weight") || tensor.rank() < 2 || tensor.is_variable() {
            return Ok(tensor);
        }
        let (path, record, adapter) = (path.to_owned(), self.record.clone(), self.adapter.clone());
        let module = Target { path, record, adapter, is_built: AtomicBool::new(false) };
        Ok(self.weights.bind(&tensor, Arc::new(module))?)
    }

    fn has(&self, name: &str) -> bool {
        let frozen = self.adapter.as_ref().map(|adapter| &adapter.options.frozen);
        frozen.is_some_and(|frozen| frozen.contains_key(name)) || self.base.has(name)
    }
}
