//! Which adapters are active on a thread, for the layers that an adapter or a set of adapters has built.
//!
//! A layer knows its scope, the adapter or the set, and its path. Active adapters have the updates of all layers of one
//! scope by their paths, and are active for the time of a closure on one thread. So a model's code needs no argument
//! for it, and each thread has its own.

use crate::layers::batch_update::BatchUpdate;
use crate::layers::mode::Mode;
use crate::ops::{weighted_sum, LowRank};
use candle_core::{Result, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// An adapter or a set of adapters, as the builder of layers: each new one is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scope(u64);

impl Default for Scope {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A layer among those of its scope.
#[derive(Debug)]
pub(crate) struct LayerId {
    pub scope: Scope,
    pub path: String,
}

/// The updates of an adapter by the paths of their layers.
pub(crate) type Updates = BTreeMap<String, LowRank>;

/// An adapter that is active, with its weight in a sum.
#[derive(Debug, Clone)]
pub(crate) struct ActiveAdapter {
    pub updates: Arc<Updates>,
    pub weight: f64,
    pub mode: Mode,
}

impl ActiveAdapter {
    fn update(&self, path: &str) -> Option<LowRank> {
        let update = self.updates.get(path)?;
        Some(match self.mode {
            Mode::Train => update.clone(),
            Mode::Eval => update.detached(),
        })
    }
}

/// What the layers of a scope compute with.
#[derive(Debug)]
pub(crate) enum Active {
    /// The weighted sum of some adapters, or the base if there are none.
    Sum(Vec<ActiveAdapter>),
    /// For consecutive rows of a batch, in order, their number and their adapter.
    Rows(Vec<(usize, Option<ActiveAdapter>)>),
}

impl Active {
    fn adapters(&self) -> Vec<&ActiveAdapter> {
        match self {
            Self::Sum(adapters) => adapters.iter().collect(),
            Self::Rows(rows) => rows.iter().filter_map(|(_, adapter)| adapter.as_ref()).collect(),
        }
    }

    fn update(&self, path: &str) -> Result<BatchUpdate> {
        match self {
            Self::Sum(adapters) => {
                let updates = adapters.iter().filter_map(|a| Some((a.update(path)?, a.weight)));
                let mut updates: Vec<_> = updates.collect();
                Ok(BatchUpdate::Whole(match updates[..] {
                    [] => None,
                    [(_, 1.)] => updates.pop().map(|(update, _)| update),
                    _ => Some(weighted_sum(&updates)?),
                }))
            }
            Self::Rows(rows) => {
                let update = |adapter: &Option<ActiveAdapter>| adapter.as_ref()?.update(path);
                let rows: Vec<_> = rows.iter().map(|(n, a)| (*n, update(a))).collect();
                let none = rows.iter().all(|(_, update)| update.is_none());
                Ok(if none { BatchUpdate::Whole(None) } else { BatchUpdate::Rows(rows) })
            }
        }
    }
}

/// The active adapters of a thread, by scope. The innermost are the last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Activations(Vec<(Scope, Arc<Active>)>);

thread_local! {
    static CURRENT: RefCell<Activations> = const { RefCell::new(Activations(vec![])) };
}

impl Activations {
    /// Those of this thread.
    pub fn current() -> Self {
        CURRENT.with_borrow(Clone::clone)
    }

    /// The variables of all active adapters, with the paths of their layers.
    pub fn variables(&self) -> Vec<(String, Tensor)> {
        let adapters = self.0.iter().flat_map(|(_, active)| active.adapters());
        let layers = adapters.flat_map(|adapter| &*adapter.updates);
        let variables = layers.flat_map(|(path, update)| {
            update.variables().map(|tensor| (path.clone(), tensor.clone()))
        });
        variables.filter(|(_, tensor)| tensor.is_variable()).collect()
    }

    /// Runs `f` with these in place of the thread's own.
    pub fn run<R>(self, f: impl FnOnce() -> R) -> R {
        /// Also when `f` panics.
        struct Restore(Activations);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(std::mem::take(&mut self.0));
            }
        }
        let _restore = Restore(CURRENT.replace(self));
        f()
    }
}

/// Runs `f`, in which the layers of `scope` compute with these adapters. An inner activation comes before an outer one.
pub(crate) fn activate<R>(scope: Scope, active: Active, f: impl FnOnce() -> R) -> R {
    let mut activations = Activations::current();
    activations.0.push((scope, Arc::new(active)));
    activations.run(f)
}

/// The update of a layer by the adapters that are active on this thread; `None` if its scope has no activation.
pub(crate) fn active_update(layer: &LayerId) -> Result<Option<BatchUpdate>> {
    let active = CURRENT.with_borrow(|activations| {
        let innermost = activations.0.iter().rev().find(|(scope, _)| *scope == layer.scope);
        innermost.map(|(_, active)| active.clone())
    });
    active.map(|active| active.update(&layer.path)).transpose()
}
