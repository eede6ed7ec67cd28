//! What models have read from a `VarBuilder` of an adapter or a set: the tensors, by which module, and as which layer.

use crate::layers::binding::active::Scope;
use crate::layers::{LayerKind, Part, SharedWeight};
use candle_core::{Shape, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// The record of all models on the `VarBuilder`s of an adapter or a set of adapters.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub scope: Scope,
    read: Mutex<Read>,
}

#[derive(Debug, Default)]
struct Read {
    tensors: BTreeMap<String, Shape>,
    /// The tables whose values heads have got that the base lacks, because it ties them.
    tables_of_heads: BTreeSet<String>,
    /// By the paths of the weights.
    modules: BTreeMap<String, ModuleRecord>,
}

/// A module whose weight was read.
#[derive(Debug, Default)]
struct ModuleRecord {
    /// Whether no layer was built around the weight since it was read.
    awaits_layer: bool,
    /// The kinds of the layers that were built around it, each once.
    kinds: Vec<LayerKind>,
    /// Whether two were built around the same tensor.
    is_shared: bool,
    /// The layers that follow the adapter or the set. The model owns them.
    layers: Vec<(LayerKind, Weak<SharedWeight>)>,
}

impl Record {
    fn lock(&self) -> MutexGuard<'_, Read> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A model has read a tensor.
    pub fn read(&self, name: &str, tensor: &Tensor) {
        let mut read = self.lock();
        read.tensors.insert(name.to_owned(), tensor.shape().clone());
        if let (path, Part::Base("weight")) = Part::parse(name) {
            read.modules.entry(path.to_owned()).or_default().awaits_layer = true;
        }
    }

    /// A model has read a head that the base lacks, and has got the values of this table.
    pub fn read_head(&self, table: &str) {
        self.lock().tables_of_heads.insert(table.to_owned());
    }

    /// Whether a head has the values of this table.
    pub fn has_head_of(&self, table: &str) -> bool {
        self.lock().tables_of_heads.contains(table)
    }

    /// A layer is built around the weight of a module, the first one around this tensor or another.
    pub fn built(&self, path: &str, kind: &LayerKind, is_first: bool) {
        let mut read = self.lock();
        let module = read.modules.entry(path.to_owned()).or_default();
        module.awaits_layer = false;
        module.is_shared |= !is_first;
        if !module.kinds.contains(kind) {
            module.kinds.push(kind.clone());
        }
    }

    /// Whether the first layer around the weight is an embedding and this one linear, or the other way round.
    pub fn is_of_other(&self, path: &str, kind: &LayerKind) -> bool {
        let other = match kind {
            LayerKind::Embedding => LayerKind::Linear,
            LayerKind::Linear => LayerKind::Embedding,
            _ => return false,
        };
        self.lock().modules.get(path).is_some_and(|module| module.kinds.first() == Some(&other))
    }

    /// This layer follows the adapter or the set.
    pub fn follows(&self, path: &str, kind: LayerKind, layer: &Arc<SharedWeight>) {
        let mut read = self.lock();
        let layers = &mut read.modules.entry(path.to_owned()).or_default().layers;
        layers.retain(|(_, layer)| layer.strong_count() > 0);
        layers.push((kind, Arc::downgrade(layer)));
    }

    /// The layers that follow, of models that exist, with their paths.
    pub fn layers(&self) -> Vec<(String, LayerKind, Arc<SharedWeight>)> {
        let read = self.lock();
        let layers = read.modules.iter().flat_map(|(path, module)| {
            module.layers.iter().map(move |(kind, layer)| (path, kind, layer))
        });
        let alive = layers
            .filter_map(|(path, kind, layer)| Some((path.clone(), kind.clone(), layer.upgrade()?)));
        alive.collect()
    }

    pub fn is_empty(&self) -> bool {
        self.lock().tensors.is_empty()
    }

    pub fn has(&self, name: &str) -> bool {
        self.lock().tensors.contains_key(name)
    }

    /// The modules whose weights no layer has taken, with the weights' ranks.
    pub fn without_layer(&self) -> Vec<(String, usize)> {
        let read = self.lock();
        let waiting = read.modules.iter().filter(|(_, module)| module.awaits_layer);
        let with_rank = waiting.filter_map(|(path, _)| {
            Some((path.clone(), read.tensors.get(&Part::Base("weight").at(path))?.rank()))
        });
        with_rank.collect()
    }

    /// The modules around whose weights several layers were built, as a tied head around an embedding's table, with
    /// these layers' kinds.
    pub fn tied(&self) -> Vec<(String, Vec<LayerKind>)> {
        let read = self.lock();
        let tied = |module: &ModuleRecord| module.is_shared || module.kinds.len() > 1;
        let tied = read.modules.iter().filter(|(_, module)| tied(module));
        tied.map(|(path, module)| (path.clone(), module.kinds.clone())).collect()
    }

    /// The paths of the modules.
    pub fn paths(&self) -> Vec<String> {
        self.lock().modules.keys().cloned().collect()
    }

    /// The last components of the modules' paths.
    pub fn names(&self) -> String {
        let read = self.lock();
        let names: BTreeSet<&str> =
            read.modules.keys().map(|path| path.rsplit('.').next().unwrap_or(path)).collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }

    /// The number of values in the tensors.
    pub fn values(&self) -> usize {
        self.lock().tensors.values().map(Shape::elem_count).sum()
    }
}
