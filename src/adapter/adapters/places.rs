//! The layers of a model that adapters can be added to, and the `VarBuilder` by which they become such.

use crate::layers::claims::{Claim, Claims};
use crate::layers::{adapt, LayerKind, LoraConfig, Mode, Owner, Part, Place, SharedWeight, Weight};
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A layer with its path and its kind.
pub(super) type Layer<W> = (String, LayerKind, W);

/// The layers, which the model owns.
#[derive(Default)]
pub(super) struct Places(Mutex<Vec<Layer<Weak<SharedWeight>>>>);

impl Places {
    /// The layers of models that exist.
    pub fn layers(&self) -> Vec<Layer<Arc<SharedWeight>>> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|(.., layer)| layer.strong_count() > 0);
        let alive = |(path, kind, layer): &Layer<Weak<SharedWeight>>| {
            Some((path.clone(), kind.clone(), layer.upgrade()?))
        };
        places.iter().filter_map(alive).collect()
    }
}

/// `base`, whose layers become places of `owner`.
pub(super) fn var_builder<'a>(
    base: VarBuilder<'a>,
    owner: Owner,
    places: Arc<Places>,
) -> VarBuilder<'a> {
    let (dtype, device) = (base.dtype(), base.device().clone());
    let backend = Base { vb: base, owner, places, claims: Claims::default() };
    VarBuilder::from_backend(Box::new(backend), dtype, device)
}

struct Base<'a> {
    vb: VarBuilder<'a>,
    owner: Owner,
    places: Arc<Places>,
    claims: Claims,
}

impl Base<'_> {
    fn register(&self, name: &str, tensor: Tensor) -> Result<Tensor> {
        let (path, Part::Base("weight")) = Part::parse(name) else { return Ok(tensor) };
        let (path, owner, places) = (path.to_owned(), self.owner, self.places.clone());
        self.claims.register(&tensor, Arc::new(NewPlace { path, owner, places }))
    }
}

impl SimpleBackend for Base<'_> {
    fn get(&self, s: Shape, name: &str, h: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        let vb = self.vb.clone().set_device(dev.clone());
        self.register(name, vb.get_with_hints_dtype(s, name, h, dtype)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> Result<Tensor> {
        let vb = self.vb.clone().set_device(dev.clone());
        self.register(name, vb.get_unchecked_dtype(name, dtype)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vb.contains_tensor(name)
    }
}

struct NewPlace {
    path: String,
    owner: Owner,
    places: Arc<Places>,
}

impl Claim for NewPlace {
    fn adapt(&self, weight: &Tensor, bias: Option<&Tensor>, kind: LayerKind) -> Option<Weight> {
        // A layer without an update of its own: one that cannot have any stays a plain layer.
        let none = VarBuilder::from_tensors(HashMap::new(), weight.dtype(), weight.device());
        let base = adapt(weight, &kind, &LoraConfig::default(), &none).ok()?;
        let place = Place { owner: self.owner, path: self.path.clone() };
        let weight = base.with_bias(bias.cloned()).shared(Mode::Train, place).ok()?;
        let mut places = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        places.extend(weight.handle().map(|layer| (self.path.clone(), kind, layer)));
        drop(places);
        Some(weight)
    }
}
