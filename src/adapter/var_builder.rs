//! The `VarBuilder` of an adapter, and of a set of adapters: it records what a model reads, and binds its modules to
//! the weights that it gives.

use super::layer::{Adapting, Module};
use super::merged_only::MergedOnly;
use super::record::Record;
use crate::base::source::{from_source, Source, Wanted};
use crate::base::{seeded, var_builder, var_builder_with};
use crate::layers::binding::TargetWeights;
use crate::utils::names::split;
use crate::utils::{Bias, StateDict};
use crate::Result;
use candle_core::Tensor;
use candle_nn::{VarBuilder, VarMap};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

/// `base` with adapters for the adapter's targets. Trainable parameters become its variables.
pub(super) fn of_adapter<'a>(
    base: VarBuilder<'a>,
    adapter: Adapting,
    record: Arc<Record>,
) -> VarBuilder<'a> {
    let (options, vars) = (adapter.options.clone(), &adapter.vars);
    let config = options.config.clone();
    let seed = options.seed;
    let replaced = Replaced {
        frozen: options.frozen.clone(),
        merged_only: MergedOnly::new(&config, vars),
        base: {
            let vb = var_builder_with(base, vars, &config, move |path| options.selects(path));
            match seed {
                Some(seed) => seeded(vb, seed),
                None => vb,
            }
        },
    };
    recorded(replaced, record, Some(adapter))
}

/// `base`, to whose layers the adapters of a set can be added.
pub(super) fn of_set<'a>(base: VarBuilder<'a>, record: Arc<Record>) -> VarBuilder<'a> {
    let base = var_builder(base, &VarMap::new(), Bias::None);
    let replaced = Replaced { base, frozen: StateDict::new(), merged_only: MergedOnly::default() };
    recorded(replaced, record, None)
}

fn recorded<'a>(
    source: Replaced<'a>,
    record: Arc<Record>,
    adapter: Option<Adapting>,
) -> VarBuilder<'a> {
    let (dtype, device) = (source.base.dtype(), source.base.device().clone());
    from_source(
        Recorded { source, record, adapter, weights: TargetWeights::default() },
        dtype,
        &device,
    )
}

/// The base with the tables that a loaded adapter has in place of the base's.
struct Replaced<'a> {
    base: VarBuilder<'a>,
    frozen: StateDict,
    merged_only: MergedOnly,
}

impl Source for Replaced<'_> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        self.merged_only.refuse(name)?;
        match self.frozen.get(name) {
            Some(own) => wanted.convert(name, own),
            None => self.base.tensor(name, wanted),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.base.has(name)
    }
}

/// A source that reports to a record.
struct Recorded<S> {
    source: S,
    record: Arc<Record>,
    adapter: Option<Adapting>,
    weights: TargetWeights,
}

impl<S: Source> Source for Recorded<S> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let tensor = self.source.tensor(name, wanted)?;
        self.record.read(name, &tensor);
        let (path, last) = split(name);
        // A variable is of a module that is trained as a whole: it stays itself, for optimizers to find.
        if last != "weight" || tensor.rank() < 2 || tensor.is_variable() {
            return Ok(tensor);
        }
        let module = Module {
            path: path.to_owned(),
            record: self.record.clone(),
            adapter: self.adapter.clone(),
            is_built: AtomicBool::new(false),
        };
        Ok(self.weights.bind(&tensor, Arc::new(module))?)
    }

    fn has(&self, name: &str) -> bool {
        self.source.has(name)
    }
}
