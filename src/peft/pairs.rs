//! The tensors of a PEFT file, told apart by their keys.

use super::keys::{self, Key};
use super::{malformed, PeftConfig};
use crate::utils::{is_lora, join, StateDict};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The factors of a layer as the file has them.
#[derive(Default)]
pub(super) struct Pair {
    pub a: Option<Tensor>,
    pub b: Option<Tensor>,
    pub embedding: bool,
}

/// The pairs by path, and everything else by its name.
pub(super) fn sort(
    config: &PeftConfig,
    tensors: StateDict,
) -> Result<(BTreeMap<String, Pair>, StateDict)> {
    let (mut pairs, mut others) = (BTreeMap::<String, Pair>::new(), vec![]);
    for (key, tensor) in tensors {
        let unknown = || {
            Error::tensor(
                &key,
                match is_lora(&key) {
                    true => "it is named as in loralib's format: `load_checkpoint` reads this file",
                    false => "it is no part of a LoRA adapter in PEFT's format",
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
            Key::Plain(name) => {
                others.push((name.to_owned(), None, key.clone(), tensor));
                continue;
            }
        };
        let pair = pairs.entry(path.to_owned()).or_default();
        if (pair.a.is_some() || pair.b.is_some()) && pair.embedding != embedding {
            return Err(Error::tensor(
                &key,
                "its layer has factors of an embedding and of another",
            ));
        }
        pair.embedding = embedding;
        match keys::parse(&key) {
            Some(Key::A(..)) => pair.a = Some(tensor),
            _ => pair.b = Some(tensor),
        }
    }
    if pairs.is_empty() {
        return Err(malformed("no lora_A and lora_B in it"));
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
            let reason = "neither modules_to_save nor bias of the configuration accounts for it";
            return Err(Error::tensor(key, reason));
        }
        if named.insert(name, tensor).is_some() {
            return Err(Error::tensor(key, "the file has it under two names"));
        }
    }
    Ok((pairs, named))
}
