//! Which adapters are active on a thread, for the layers that an adapter or a set of adapters has built.
//!
//! A layer knows its scope, the adapter or the set, and its path. Active adapters have the updates of all layers of one
//! scope by their paths, and are active for the time of a closure. So a model's code needs no argument for it, and each
//! thread has its own.
//!
//! A worker of a rayon pool that waits for a part of its work runs any other task of the pool meanwhile, which must not
//! see what was activated below it on the stack. So nothing is ever activated on such a thread: [`workers`] has threads
//! for it.

use super::workers::{self, OnDrop};
use crate::layers::batch_update::BatchUpdate;
use crate::layers::mode::Mode;
use crate::ops::{weighted_sum, LowRank};
use crate::Error;
use candle_core::{bail, Result, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// An adapter or a set of adapters, as the builder of layers: each new one is another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope(Arc<Requirement>);

/// Whether a forward without active adapters is an error.
#[derive(Debug, Default)]
struct Requirement(AtomicBool);

impl Scope {
    pub fn require_active(&self, required: bool) {
        self.0 .0.store(required, Ordering::Relaxed);
    }

    fn requires_active(&self) -> bool {
        self.0 .0.load(Ordering::Relaxed)
    }
}

impl PartialEq for Scope {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
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
    /// Its own, by which it is disabled.
    pub scope: Scope,
    pub updates: Arc<Updates>,
    pub weight: f64,
    pub mode: Mode,
}

impl ActiveAdapter {
    fn update(&self, path: &str, among: &Activations) -> Option<LowRank> {
        if among.disable(&self.scope) {
            return None;
        }
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

    fn update(&self, path: &str, among: &Activations) -> Result<BatchUpdate> {
        match self {
            Self::Sum(adapters) => {
                let updates = adapters.iter();
                let updates = updates.filter_map(|a| Some((a.update(path, among)?, a.weight)));
                let mut updates: Vec<_> = updates.collect();
                Ok(BatchUpdate::Whole(match updates[..] {
                    [] => None,
                    [(_, 1.)] => updates.pop().map(|(update, _)| update),
                    _ => Some(weighted_sum(&updates)?),
                }))
            }
            Self::Rows(rows) => {
                let update =
                    |adapter: &Option<ActiveAdapter>| adapter.as_ref()?.update(path, among);
                let rows: Vec<_> = rows.iter().map(|(n, a)| (*n, update(a))).collect();
                let none = rows.iter().all(|(_, update)| update.is_none());
                Ok(if none { BatchUpdate::Whole(None) } else { BatchUpdate::Rows(rows) })
            }
        }
    }
}

/// Active adapters by scope. The innermost are the last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Activations(Vec<(Scope, Arc<Active>)>);

thread_local! {
    static CURRENT: RefCell<Activations> = const { RefCell::new(Activations(vec![])) };
}

/// The `run` of a closure that stays on its thread was called where that cannot be.
const ON_A_WORKER: &str =
    "a worker of a rayon pool runs other tasks while it waits, which would compute with this \
                           choice: use `run`, which has threads of its own";

impl Activations {
    pub fn of(scope: &Scope, active: Active) -> Self {
        Self(vec![(scope.clone(), Arc::new(active))])
    }

    /// Those of this thread.
    pub fn current() -> Self {
        CURRENT.with_borrow(Clone::clone)
    }

    /// Makes these the thread's own until it has others.
    fn set(self) {
        CURRENT.set(self);
    }

    /// These within those of this thread.
    pub fn within_current(&self) -> Self {
        let mut activations = Self::current();
        activations.0.extend(self.0.iter().cloned());
        activations
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

    /// Whether an adapter of this scope is disabled, wherever it was chosen.
    fn disable(&self, adapter: &Scope) -> bool {
        let none = |active: &Active| matches!(active, Active::Sum(adapters) if adapters.is_empty());
        self.0.iter().any(|(scope, active)| scope == adapter && none(active))
    }

    /// Runs `f` with these in place of the thread's own; called by a worker of a rayon pool, on other threads.
    pub fn run<T: Send, E: From<Error> + Send>(
        self,
        f: impl FnOnce() -> std::result::Result<T, E> + Send,
    ) -> std::result::Result<T, E> {
        let unchanged = self.0.is_empty() && CURRENT.with_borrow(|current| current.0.is_empty());
        match workers::is_worker() && !unchanged {
            true => workers::run(|| self.clone().set(), || Self::default().set(), f)?,
            false => self.run_here(f),
        }
    }

    /// [`run`](Self::run) on this thread.
    pub fn run_local<T, E: From<Error>>(
        self,
        f: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        match workers::is_worker() {
            true => Err(Error::Invalid(ON_A_WORKER.to_owned()).into()),
            false => self.run_here(f),
        }
    }

    fn run_here<R>(self, f: impl FnOnce() -> R) -> R {
        let mut outer = CURRENT.replace(self);
        let _restore = OnDrop(|| std::mem::take(&mut outer).set()); // also when `f` panics
        f()
    }

    fn innermost(&self, scope: &Scope) -> Option<&Active> {
        self.0.iter().rev().find(|(other, _)| other == scope).map(|(_, active)| &**active)
    }
}

/// What the update of a layer by the adapters that are active on this thread is computed from; `None` if its scope has no
/// activation.
pub(crate) fn active_variables(layer: &LayerId) -> Option<Vec<Tensor>> {
    let current = Activations::current();
    let adapters = current.innermost(&layer.scope)?.adapters();
    let updates = adapters.iter().filter_map(|adapter| adapter.update(&layer.path, &current));
    Some(updates.flat_map(|update| update.variables().cloned().collect::<Vec<_>>()).collect())
}

/// The update of a layer by the adapters that are active on this thread; `None` if its scope has no activation.
pub(crate) fn active_update(layer: &LayerId) -> Result<Option<BatchUpdate>> {
    let current = Activations::current();
    match current.innermost(&layer.scope) {
        Some(active) => Ok(Some(active.update(&layer.path, &current)?)),
        None if layer.scope.requires_active() => bail!(
            "{}: no adapter is chosen on this thread, and the set requires a choice: run the forward in `with`, \
             `with_none` or `with_rows`, and in other threads in `Choice::run`",
            layer.path
        ),
        None => Ok(None),
    }
}
