//! The names of tensors in a PEFT file.

use crate::utils::names::{is_within, split};
use crate::utils::{AdapterConfig, Bias};

const PREFIX: &str = "base_model.model.";

/// Embeddings that PEFT saves with an adapter if they are adapted or were resized.
const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];

/// The meaning of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key<'a> {
    /// The factor A of a layer; whether it is an embedding.
    A(&'a str, bool),
    /// The factor B of a layer; whether it is an embedding.
    B(&'a str, bool),
    /// A parameter of the layer under the adapter.
    Base(&'a str, &'a str),
    /// Any other parameter.
    Other(&'a str),
}

pub(super) fn parse(key: &str) -> Option<Key<'_>> {
    let name = key.strip_prefix(PREFIX)?;
    let (path, last) = split(name);
    Some(match (last, split(path)) {
        ("lora_embedding_A", _) => Key::A(path, true),
        ("lora_embedding_B", _) => Key::B(path, true),
        ("weight", (path, "lora_A")) => Key::A(path, false),
        ("weight", (path, "lora_B")) => Key::B(path, false),
        (last, (path, "base_layer")) => Key::Base(path, last),
        _ => Key::Other(name),
    })
}

pub(super) fn pair(path: &str, embedding: bool) -> (String, String) {
    if embedding {
        (format!("{PREFIX}{path}.lora_embedding_A"), format!("{PREFIX}{path}.lora_embedding_B"))
    } else {
        (format!("{PREFIX}{path}.lora_A.weight"), format!("{PREFIX}{path}.lora_B.weight"))
    }
}

/// The key of a tensor that is not a factor; `adapted` if its layer has an adapter.
pub(super) fn base_key(name: &str, adapted: bool) -> String {
    let (path, last) = split(name);
    if adapted {
        format!("{PREFIX}{path}.base_layer.{last}")
    } else {
        format!("{PREFIX}{name}")
    }
}

/// Whether PEFT saves this parameter in an adapter with these options.
pub(super) fn is_carried(name: &str, config: &AdapterConfig) -> bool {
    let (path, last) = split(name);
    let bias = last == "bias" && config.bias != Bias::None;
    let table = last == "weight" && TABLES.contains(&split(path).1);
    bias || table || config.modules_to_save.iter().any(|module| is_within(name, module))
}
