//! The tensors of a PEFT file, grouped by layer.

use super::files::malformed;
use super::keys::{self, Key};
use crate::utils::names::{is_lora, join};
use crate::utils::{AdapterConfig, StateDict};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The factors of a layer as in the file.
#[derive(Default)]
pub(super) struct Pair {
    pub a: Option<Tensor>,
    pub b: Option<Tensor>,
    pub embedding: bool,
}

/// The pairs by path, and all other tensors by name.
pub(super) fn group(
    config: &AdapterConfig,
    tensors: StateDict,
) -> Result<(BTreeMap<String, Pair>, StateDict)> {
    let (mut pairs, mut others) = (BTreeMap::<String, Pair>::new(), vec![]);
    for (key, tensor) in tensors {
        let unknown = || {
            Error::tensor(
                &key,
                if is_lora(&key) {
                    "this is a name of loralib's format: read the file with `load_checkpoint`"
                } else {
                    "its name is not one of a LoRA adapter in PEFT's format"
                },
            )
        };
        let (path, embedding) = match keys::parse(&key).ok_or_else(unknown)? {
            Key::A(path, embedding) | Key::B(path, embedding) if !path.is_empty() => {
                (path, embedding)
            }
            Key::A(..) | Key::B(..) => return Err(unknown()),
            Key::Base(path, last) => {
                others.push((join(path, last), Some(path.to_owned()), key.clone(), tensor));
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
        pair.embedding = embedding;
        match keys::parse(&key) {
            Some(Key::A(..)) => pair.a = Some(tensor),
            _ => pair.b = Some(tensor),
        }
    }
    if pairs.is_empty() {
        return Err(malformed("it has no lora_A and lora_B"));
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
            let reason = "the configuration's modules_to_save and bias do not include it";
            return Err(Error::tensor(key, reason));
        }
        if named.insert(name, tensor).is_some() {
            return Err(Error::tensor(key, "the file has it under two names"));
        }
    }
    Ok((pairs, named))
}
