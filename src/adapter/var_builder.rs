//! The `VarBuilder` of an adapter, or of a set of adapters: it records what a model reads, and binds its modules to
//! the weights that it gives.

use super::merged_only::MergedOnly;
use super::options::Options;
use super::record::Record;
use super::target::{AdapterParts, Target};
use crate::base::source::{from_source, Source, Wanted};
use crate::base::{var_builder, var_builder_with};
use crate::layers::binding::target::{target_of, TargetWeights};
use crate::layers::Part;
use crate::weights::{untied_table, Bias};
use crate::{Error, Result};
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
            let any_size = options.ignore_mismatched_sizes;
            let vb = var_builder_with(base, vars, &options.config, any_size, selects);
            (options.seeded(vb), MergedOnly::new(options))
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

impl Recorded<'_> {
    /// The tensor that a loaded adapter has in place of the base's. A head that the base ties to a table follows it.
    fn replacing<'o>(&self, name: &str, options: &'o Options) -> Option<&'o Tensor> {
        let of_table = || {
            let table = untied_table(name, |name| self.base.has(name))?;
            options.frozen.get(&table)
        };
        options.frozen.get(name).or_else(of_table)
    }
}

impl Source for Recorded<'_> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        self.merged_only.refuse(name)?;
        let table = untied_table(name, |name| self.base.has(name));
        if let Some(table) = &table {
            self.record.read_head(table);
        }
        let tensor = match self.adapter.as_ref().map(|adapter| &adapter.options) {
            None => self.base.tensor(name, wanted)?,
            Some(options) => match self.replacing(name, options) {
                Some(own) => wanted.convert(name, own)?,
                None => self.base.tensor(options.tied.get(name).map_or(name, |n| n), wanted)?,
            },
        };
        self.record.read(name, &tensor);
        let (path, part) = Part::parse(name);
        if part != Part::Base("weight") || tensor.rank() < 2 {
            return Ok(tensor);
        }
        if !tensor.is_variable() && target_of(&tensor).is_some() {
            let reason = "the base gives it as a layer of another adapter, whose update would be lost: give `merged` of that \
                          adapter as the base, or choose several by `Adapters`";
            return Err(Error::tensor(name, reason));
        }
        let (path, record, adapter) = (path.to_owned(), self.record.clone(), self.adapter.clone());
        let table = table.map(|name| Part::parse(&name).0.to_owned());
        let module = Target { path, table, record, adapter, is_built: AtomicBool::new(false) };
        Ok(self.weights.bind(&tensor, Arc::new(module))?)
    }

    fn has(&self, name: &str) -> bool {
        let has = |options: &Arc<Options>| {
            options.frozen.contains_key(name) || options.tied.contains_key(name)
        };
        self.adapter.as_ref().is_some_and(|adapter| has(&adapter.options)) || self.base.has(name)
    }
}
