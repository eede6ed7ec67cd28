//! The modules that weights belong to, as an adapter's `VarBuilder` has given them out.

use super::placeholder::{placeholder_view, Blocks};
use super::registry::{Bound, Registry};
use crate::layers::kind::LayerKind;
use crate::layers::weight::Weight;
use candle_core::{Result, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// A module of a model, which an adapter may adapt.
pub(crate) trait TargetModule: Send + Sync {
    /// A layer of this kind is built around the weight: its weight and bias, or `None` if it stays a plain layer.
    fn adapt(&self, weight: &Tensor, bias: Option<&Tensor>, kind: LayerKind) -> Option<Weight>;
}

static TARGETS: Registry<dyn TargetModule> = Registry::new();

/// The weights that a `VarBuilder` has given out. They have their modules as long as it lives.
#[derive(Default)]
pub(crate) struct TargetWeights(Mutex<Vec<Given>>);

type Given = (Arc<Bound<dyn TargetModule>>, Option<Blocks>);

impl TargetWeights {
    /// `weight` with an id of its own, to which the module is bound: a base in memory gives the same tensor to every
    /// reader. A variable stays itself, for optimizers to find.
    pub fn bind(&self, weight: &Tensor, module: Arc<dyn TargetModule>) -> Result<Tensor> {
        let view = match weight.is_variable() {
            true => weight.clone(),
            false => weight.unsqueeze(0)?.squeeze(0)?,
        };
        let placeholder = placeholder_view(weight, &view);
        let given = (TARGETS.bind(&view, module), placeholder);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(given);
        Ok(view)
    }
}

/// The module whose weight this is.
pub(crate) fn target_of(weight: &Tensor) -> Option<Arc<dyn TargetModule>> {
    Some(TARGETS.get(weight)?.value().clone())
}
