//! The tensors of a PEFT file, grouped by layer.

use super::folder::malformed;
use super::keys::{self, Key};
use crate::files::StateDict;
use crate::layers::Part;
use crate::weights::AdapterConfig;
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The factors of a layer as in the file.
#[derive(Default)]
pub(super) struct Pair {
    pub a: Option<Tensor>,
    pub b: Option<Tensor>,
    /// The bias of B.
    pub bias: Option<Tensor>,
    /// DoRA's.
    pub magnitude: Option<Tensor>,
    pub embedding: bool,
    /// Its path in the file's keys.
    pub path: String,
    /// Its place among the adapted parameters of its module, if it is a parameter's.
    pub parameter: Option<usize>,
}

impl Pair {
    /// The inputs and outputs, in either order.
    pub fn sizes(&self) -> [usize; 2] {
        let size = |factor: Option<usize>| factor.unwrap_or(0);
        let inputs = size(self.a.as_ref().and_then(|a| a.dims().last().copied()));
        let outputs = size(self.b.as_ref().and_then(|b| b.dims().first().copied()));
        [inputs.min(outputs), inputs.max(outputs)]
    }
}

/// The tensors of a file.
pub(super) struct Grouped {
    /// The factors by the path in their keys.
    pub pairs: BTreeMap<String, Pair>,
    /// Rows of tables, by the table's path.
    pub tokens: StateDict,
    /// All other tensors by name.
    pub others: StateDict,
}

pub(super) fn group(config: &AdapterConfig, tensors: StateDict) -> Result<Grouped> {
    let (mut pairs, mut others) = (BTreeMap::<String, Pair>::new(), vec![]);
    let mut tokens = StateDict::new();
    for (key, tensor) in tensors {
        let unknown = || Error::tensor(&key, keys::reason(&key));
        let parsed = keys::parse(&key).ok_or_else(unknown)?;
        let (path, embedding) = match parsed {
            Key::A("", _) | Key::B("", _) | Key::BiasOfB("") | Key::Magnitude("") => {
                return Err(unknown())
            }
            Key::A(path, embedding) | Key::B(path, embedding) => (path, embedding),
            Key::BiasOfB(path) => (path, false),
            Key::Magnitude(path) => {
                let pair = pairs.entry(path.to_owned()).or_default();
                pair.path = path.to_owned();
                if pair.magnitude.replace(tensor).is_some() {
                    return Err(Error::tensor(&key, "the file has it under two names"));
                }
                continue;
            }
            Key::Tokens(path) => {
                tokens.insert(path.to_owned(), tensor);
                continue;
            }
            Key::Training => continue,
            Key::Base(path, last) => {
                others.push((
                    Part::Base(last).at(path),
                    Some(path.to_owned()),
                    key.clone(),
                    tensor,
                ));
                continue;
            }
            Key::Other(name) => {
                others.push((name.to_owned(), None, key.clone(), tensor));
                continue;
            }
        };
        let pair = pairs.entry(path.to_owned()).or_default();
        if (pair.a.is_some() || pair.b.is_some()) && pair.embedding != embedding {
            return Err(Error::tensor(
                &key,
                "its layer has the factors of an embedding and of another layer",
            ));
        }
        (pair.embedding, pair.path) = (embedding, path.to_owned());
        match parsed {
            Key::A(..) => pair.a = Some(tensor),
            Key::B(..) => pair.b = Some(tensor),
            _ => pair.bias = Some(tensor),
        }
    }
    if pairs.is_empty() {
        let named = others.iter().map(|(.., key, _)| key).find(|key| keys::names_adapter(key));
        return Err(match named {
            Some(key) => Error::tensor(key, keys::reason(key)),
            None => malformed("it has no lora_A and lora_B"),
        });
    }
    let mut named = StateDict::new();
    for (name, base_of, key, tensor) in others {
        let fits = match base_of {
            Some(path) => {
                pairs.contains_key(&path)
                    && (name.ends_with(".weight") || keys::is_carried(&name, config))
            }
            None => keys::is_carried(&name, config),
        };
        if !fits {
            let reason = match keys::names_adapter(&key) {
                true => keys::reason(&key),
                false => {
                    "the configuration's modules_to_save and bias do not include it".to_owned()
                }
            };
            return Err(Error::tensor(key, reason));
        }
        if named.insert(name, tensor).is_some() {
            return Err(Error::tensor(key, "the file has it under two names"));
        }
    }
    Ok(Grouped { pairs, tokens, others: named })
}
