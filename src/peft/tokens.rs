//! `trainable_token_indices`: rows of an embedding's table that the adapter replaces.

use super::keys;
use crate::utils::names::{ends_in, join};
use crate::utils::{AdapterConfig, StateDict};
use crate::{Error, Result};
use candle_core::Tensor;
use serde_json::Value;
use std::collections::BTreeMap;

/// The option's value.
#[derive(Debug)]
pub(super) enum TokenIndices {
    /// Of the input embeddings, whose name the tensors tell.
    Input(Vec<usize>),
    /// By module. A head that is tied to another table has no tensor of its own.
    Modules(BTreeMap<String, Vec<usize>>),
}

impl Default for TokenIndices {
    fn default() -> Self {
        Self::Modules(BTreeMap::new())
    }
}

impl TokenIndices {
    pub fn read(value: &Value) -> Option<Self> {
        let Value::Object(modules) = value else { return list(value).map(Self::Input) };
        let entry = |(module, value): (&String, _)| Some((module.clone(), list(value)?));
        Some(Self::Modules(modules.iter().map(entry).collect::<Option<_>>()?))
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Input(indices) => indices.is_empty(),
            Self::Modules(modules) => modules.values().all(Vec::is_empty),
        }
    }
}

/// A list of indices.
pub(super) fn list(value: &Value) -> Option<Vec<usize>> {
    value.as_array()?.iter().map(|item| item.as_u64()?.try_into().ok()).collect()
}

/// The indices of each table of which the adapter has rows.
pub(super) fn indices(
    option: &TokenIndices,
    tokens: &StateDict,
) -> Result<BTreeMap<String, Vec<usize>>> {
    let table = |(path, rows): (&String, &Tensor)| {
        let own = match option {
            TokenIndices::Input(indices) => Some(indices),
            TokenIndices::Modules(modules) => {
                modules.iter().find(|(module, _)| ends_in(path, module)).map(|(_, own)| own)
            }
        };
        match own {
            Some(own) if rows.rank() == 2 && rows.dims()[0] == own.len() => {
                Ok((path.clone(), own.clone()))
            }
            own => {
                let reason = format!(
                    "its shape is {:?}, the configuration has {} trainable_token_indices for it",
                    rows.dims(),
                    own.map_or(0, Vec::len)
                );
                Err(Error::tensor(keys::tokens(path), reason))
            }
        }
    };
    if tokens.is_empty() && !option.is_empty() {
        return Err(Error::tensor(
            "trainable_tokens_delta",
            "it is missing, trainable_token_indices are set",
        ));
    }
    tokens.iter().map(table).collect()
}

/// An error unless an adapter has the rows of each table that the configuration names.
pub(super) fn check(config: &AdapterConfig, tensors: &StateDict) -> Result<()> {
    for (path, indices) in &config.trainable_token_indices {
        let name = join(path, "trainable_tokens");
        match tensors.get(&name).map(Tensor::dims) {
            None => return Err(Error::tensor(name, "it is missing, its token indices are set")),
            Some(dims) if dims.first() != Some(&indices.len()) => {
                let reason =
                    format!("its shape is {dims:?}, it has {} token indices", indices.len());
                return Err(Error::tensor(name, reason));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
