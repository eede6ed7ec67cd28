//! What an adapter knows of its models besides their record: the mode, and the options of the adapted layers.

use super::options::Options;
use super::record::Record;
use crate::layers::Mode;
use crate::weights::LayerConfig;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct State {
    /// The mode that was set.
    pub mode: Option<Mode>,
    /// The options of the last model.
    pub options: Option<Arc<Options>>,
    pub adapted: Adapted,
    pub merged: Option<MergedModel>,
}

pub(crate) fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The model on [`merged`](super::Adapter::merged).
#[derive(Debug)]
pub(crate) struct MergedModel {
    pub record: Arc<Record>,
    /// The tensors of the base that the adapter changes.
    pub changed: Vec<String>,
}

impl State {
    pub fn mode(&self) -> Mode {
        self.mode.unwrap_or(Mode::Train)
    }

    /// The mode among other adapters: one that was loaded serves until it is to train.
    pub fn mode_among_others(&self, loaded: bool) -> Mode {
        self.mode.unwrap_or(if loaded { Mode::Eval } else { Mode::Train })
    }
}

/// The layers that an adapter has adapted, by path.
#[derive(Debug, Default, Clone)]
pub(crate) struct Adapted {
    /// Their options with their kinds.
    pub layers: BTreeMap<String, LayerConfig>,
    /// The rows of tables that are trained, by the tables' paths.
    pub tokens: BTreeMap<String, Vec<usize>>,
    /// The heads that follow the updates of tables, by their paths, and the tables'.
    pub tied: BTreeMap<String, String>,
    /// Why the last layer at a path could not be adapted. An earlier model may have one that is.
    pub failures: BTreeMap<String, String>,
}

impl Adapted {
    pub fn insert(&mut self, path: &str, layer: Result<LayerConfig, String>) {
        match layer {
            Ok(layer) => {
                self.failures.remove(path);
                self.layers.insert(path.to_owned(), layer);
            }
            Err(reason) => drop(self.failures.insert(path.to_owned(), reason)),
        }
    }

    pub fn insert_tokens(&mut self, path: &str, indices: Result<Vec<usize>, String>) {
        match indices {
            Ok(indices) => {
                self.failures.remove(path);
                self.tokens.insert(path.to_owned(), indices);
            }
            Err(reason) => drop(self.failures.insert(path.to_owned(), reason)),
        }
    }
}
