//! Weights that an adapter's `VarBuilder` has given out and that no layer has taken yet.
//!
//! A layer's constructor gets tensors alone, and may get them by a `VarBuilder` or from the model's own
//! code, as in `Linear::new(vb.get(.., "weight")?, None)`. So the adapter registers a claim under the id of each
//! target's weight, and the layer that is built around the tensor takes it.

use super::config::LoraConfig;
use super::kind::LayerKind;
use super::weight::Weight;
use candle_core::{Result, Tensor, TensorId};
use candle_nn::VarBuilder;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

/// How the layer around a weight is adapted.
pub(crate) trait Claim: Send + Sync {
    /// Builds the adapted weight of a layer of this kind by `adapt`, from its options, its declared kind
    /// and a `VarBuilder` for the factors. `None` if the layer stays without an adapter.
    fn adapt(&self, weight: &Tensor, kind: LayerKind, adapt: &Adapt) -> Option<Weight>;
}

/// The part of a layer's constructor that makes its adapted weight.
pub(crate) type Adapt<'a> = dyn Fn(&LoraConfig, &LayerKind, &VarBuilder) -> Result<Weight> + 'a;

/// Claims live as long as the `VarBuilder` that registered them; ids are never reused.
static CLAIMS: LazyLock<Mutex<HashMap<TensorId, Weak<dyn Claim>>>> =
    LazyLock::new(Default::default);

/// Registers a claim for the layer that will be built around `weight`.
pub(crate) fn register(weight: &Tensor, claim: &Arc<dyn Claim>) {
    let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
    claims.retain(|_, claim| claim.strong_count() > 0);
    claims.insert(weight.id(), Arc::downgrade(claim));
}

/// Takes the claim for `weight`. Only one layer gets it: a head that is tied to an adapted embedding has no
/// adapter, as in PEFT.
pub(crate) fn take(weight: &Tensor) -> Option<Arc<dyn Claim>> {
    CLAIMS.lock().unwrap_or_else(PoisonError::into_inner).remove(&weight.id())?.upgrade()
}
