//! `trainable_token_indices`: rows of an embedding's table that the adapter replaces.

use super::keys;
use crate::files::StateDict;
use crate::layers::ends_in;
use crate::weights::TokenRows;
use crate::{Error, Result};
use candle_core::Tensor;
use serde::Deserialize;
use std::collections::BTreeMap;

/// The option's value.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
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
    /// The indices by the tables' names; `""` is that of the input embeddings.
    pub fn by_table(&self) -> BTreeMap<String, Vec<usize>> {
        let mut tables = match self {
            Self::Input(indices) => [(String::new(), indices.clone())].into(),
            Self::Modules(modules) => modules.clone(),
        };
        tables.retain(|_, indices| !indices.is_empty());
        tables
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Input(indices) => indices.is_empty(),
            Self::Modules(modules) => modules.values().all(Vec::is_empty),
        }
    }
}

/// The rows of tables with their indices.
pub(super) fn token_rows(
    option: &TokenIndices,
    tokens: StateDict,
) -> Result<BTreeMap<String, TokenRows>> {
    let table = |(path, rows): (String, Tensor)| {
        let own = match option {
            TokenIndices::Input(indices) => Some(indices),
            TokenIndices::Modules(modules) => {
                modules.iter().find(|(module, _)| ends_in(&path, module)).map(|(_, own)| own)
            }
        };
        match own {
            Some(own) if rows.rank() == 2 && rows.dims()[0] == own.len() => {
                Ok((path, TokenRows { indices: own.clone(), rows }))
            }
            own => {
                let reason = format!(
                    "its shape is {:?}, the configuration has {} trainable_token_indices for it",
                    rows.dims(),
                    own.map_or(0, Vec::len)
                );
                Err(Error::tensor(keys::tokens(&path), reason))
            }
        }
    };
    if tokens.is_empty() && !option.is_empty() {
        return Err(Error::tensor(
            "trainable_tokens_delta",
            "it is missing, trainable_token_indices are set",
        ));
    }
    tokens.into_iter().map(table).collect()
}
