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

/// The layers that an adapter was to adapt, by path: their options with their kinds, or why they could not be adapted.
#[derive(Debug, Default, Clone)]
pub(crate) struct Adapted(pub BTreeMap<String, Result<LayerConfig, String>>);

impl Adapted {
    pub fn contains(&self, path: &str) -> bool {
        self.0.get(path).is_some_and(Result::is_ok)
    }

    pub fn layers(&self) -> impl Iterator<Item = (&str, &LayerConfig)> {
        self.0.iter().filter_map(|(path, layer)| Some((path.as_str(), layer.as_ref().ok()?)))
    }

    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .filter_map(|(path, layer)| Some((path.as_str(), layer.as_ref().err()?.as_str())))
    }
}
