//! Weights that an adapter's `VarBuilder` has given out and that no layer has taken yet.
//!
//! A layer's constructor gets tensors alone, and may get them by a `VarBuilder` or from the model's own
//! code, as in `Linear::new(vb.get(.., "weight")?, None)`. So the adapter registers a claim under the id of each
//! target's weight, and the layer that is built around the tensor takes it.

use super::base::alias_quantized;
use super::kind::LayerKind;
use super::weight::Weight;
use candle_core::{Result, Tensor, TensorId};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

/// How the layer around a weight is adapted.
pub(crate) trait Claim: Send + Sync {
    /// The weight and the bias of a layer of this kind. `None` if the layer stays without an adapter.
    fn adapt(&self, weight: &Tensor, bias: Option<&Tensor>, kind: LayerKind) -> Option<Weight>;
}

/// The claims by the ids of their tensors; ids are never reused.
static CLAIMS: LazyLock<Mutex<HashMap<TensorId, Weak<dyn Claim>>>> =
    LazyLock::new(Default::default);

/// The claims of a `VarBuilder`, which live as long as it.
#[derive(Default)]
pub(crate) struct Claims(Mutex<Vec<Arc<dyn Claim>>>);

impl Claims {
    /// Registers a claim for the layer that will be built around `weight`, which gets an id of its own: a base in
    /// memory gives the same tensor to every reader.
    pub fn register(&self, weight: &Tensor, claim: Arc<dyn Claim>) -> Result<Tensor> {
        let own = weight.unsqueeze(0)?.squeeze(0)?;
        alias_quantized(weight, &own);
        let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
        claims.retain(|_, claim| claim.strong_count() > 0);
        claims.insert(own.id(), Arc::downgrade(&claim));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(claim);
        Ok(own)
    }
}

/// Takes the claim for `weight`. Only one layer gets it: a head that is tied to an adapted embedding has no
/// adapter, as in PEFT.
pub(crate) fn take(weight: &Tensor) -> Option<Arc<dyn Claim>> {
    CLAIMS.lock().unwrap_or_else(PoisonError::into_inner).remove(&weight.id())?.upgrade()
}
