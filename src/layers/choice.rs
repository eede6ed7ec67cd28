//! Which updates the layers of a model compute with: their own, or those that this thread has chosen.
//!
//! A layer that an adapter has built knows whose it is, and its path. A choice has the updates of all layers of one
//! owner by their paths, and holds for the time of a closure on one thread. So a model's code needs no
//! argument for it, and other threads choose for themselves.

use super::mode::Mode;
use super::update::Update;
use crate::ops::{weighted_sum, LowRank};
use candle_core::{Result, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Whose layers a choice is for: each new one is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner(u64);

impl Default for Owner {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A layer among those of its owner.
#[derive(Debug)]
pub(crate) struct Place {
    pub owner: Owner,
    pub path: String,
}

/// The updates of one adapter by the paths of their layers, and how they count.
#[derive(Debug, Clone)]
pub(crate) struct Chosen {
    pub updates: Arc<BTreeMap<String, LowRank>>,
    pub strength: f64,
    pub mode: Mode,
}

impl Chosen {
    fn update(&self, path: &str) -> Option<LowRank> {
        let update = self.updates.get(path)?;
        Some(match self.mode {
            Mode::Train => update.clone(),
            Mode::Eval => update.detached(),
        })
    }
}

/// What the layers of an owner compute with.
#[derive(Debug)]
pub(crate) enum Choice {
    /// The weighted sum of some adapters, or the base if there are none.
    Sum(Vec<Chosen>),
    /// For consecutive rows of a batch, in order, their number and their adapter.
    Rows(Vec<(usize, Option<Chosen>)>),
}

impl Choice {
    fn update(&self, path: &str) -> Result<Update> {
        match self {
            Self::Sum(adapters) => {
                let updates = adapters.iter().filter_map(|c| Some((c.update(path)?, c.strength)));
                let mut updates: Vec<_> = updates.collect();
                Ok(Update::Whole(match updates[..] {
                    [] => None,
                    [(_, 1.)] => updates.pop().map(|(update, _)| update),
                    _ => Some(weighted_sum(&updates)?),
                }))
            }
            Self::Rows(rows) => {
                let of = |(n, chosen): &(usize, Option<Chosen>)| {
                    (*n, chosen.as_ref().and_then(|chosen| chosen.update(path)))
                };
                let rows: Vec<_> = rows.iter().map(of).collect();
                let none = rows.iter().all(|(_, update)| update.is_none());
                Ok(if none { Update::Whole(None) } else { Update::Rows(rows) })
            }
        }
    }
}

/// The choices that hold on a thread. The innermost is the last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Choices(Vec<(Owner, Arc<Choice>)>);

thread_local! {
    static CHOICES: RefCell<Choices> = const { RefCell::new(Choices(vec![])) };
}

impl Choices {
    /// Those of this thread.
    pub fn current() -> Self {
        CHOICES.with_borrow(Clone::clone)
    }

    /// The variables of all adapters that are chosen, with the paths of their layers.
    pub fn variables(&self) -> Vec<(String, Tensor)> {
        let adapters = self.0.iter().flat_map(|(_, choice)| match &**choice {
            Choice::Sum(adapters) => adapters.iter().collect::<Vec<_>>(),
            Choice::Rows(rows) => rows.iter().filter_map(|(_, chosen)| chosen.as_ref()).collect(),
        });
        let layers = adapters.flat_map(|chosen| &*chosen.updates);
        let variables = layers.flat_map(|(path, update)| {
            update.variables().map(|tensor| (path.clone(), tensor.clone()))
        });
        variables.filter(|(_, tensor)| tensor.is_variable()).collect()
    }

    /// Runs `f` with these in place of the thread's own.
    pub fn run<R>(self, f: impl FnOnce() -> R) -> R {
        /// Also when `f` panics.
        struct Restore(Choices);
        impl Drop for Restore {
            fn drop(&mut self) {
                CHOICES.set(std::mem::take(&mut self.0));
            }
        }
        let _restore = Restore(CHOICES.replace(self));
        f()
    }
}

/// Runs `f` with a choice for the layers of `owner`. A choice within counts before one around it.
pub(crate) fn choose<R>(owner: Owner, choice: Choice, f: impl FnOnce() -> R) -> R {
    let mut choices = Choices::current();
    choices.0.push((owner, Arc::new(choice)));
    choices.run(f)
}

/// The update that this thread has chosen for a layer; `None` if it has made no choice.
pub(super) fn chosen(place: &Place) -> Result<Option<Update>> {
    let choice = CHOICES.with_borrow(|choices| {
        let of_owner = choices.0.iter().rev().find(|(owner, _)| *owner == place.owner);
        of_owner.map(|(_, choice)| choice.clone())
    });
    choice.map(|choice| choice.update(&place.path)).transpose()
}
