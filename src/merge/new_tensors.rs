//! What a merge adds to a base.

use super::plan::Plan;
use candle_core::Tensor;
use std::collections::BTreeMap;

/// Tensors of a merged model that its base has not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NewTensors {
    /// Heads that the base ties to the embeddings: set `tie_word_embeddings` to `false` in the model's configuration.
    pub untied: Vec<String>,
    /// Those of modules that the adapter trains whole, such as a new head.
    pub added: Vec<String>,
}

impl NewTensors {
    pub(super) fn of(plan: &Plan, added: &BTreeMap<&str, Tensor>) -> Self {
        Self {
            untied: plan.untied().map(|(head, _)| head.to_owned()).collect(),
            added: added.keys().map(|name| (*name).to_owned()).collect(),
        }
    }
}
