//! The names of tensors in a PEFT file.

use crate::utils::{is_within, split};
use crate::{Error, Result};

const PREFIX: &str = "base_model.model.";

/// Embeddings that PEFT saves beside an adapter when they are adapted or were resized.
const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];

/// What a key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key<'a> {
    /// The factor A of a layer; whether it is an embedding.
    A(&'a str, bool),
    /// The factor B of a layer; whether it is an embedding.
    B(&'a str, bool),
    /// A parameter of the layer under the adapter.
    Base(&'a str, &'a str),
    /// Any other parameter.
    Plain(&'a str),
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
        _ => Key::Plain(name),
    })
}

pub(super) fn pair(path: &str, embedding: bool) -> (String, String) {
    match embedding {
        true => {
            (format!("{PREFIX}{path}.lora_embedding_A"), format!("{PREFIX}{path}.lora_embedding_B"))
        }
        false => (format!("{PREFIX}{path}.lora_A.weight"), format!("{PREFIX}{path}.lora_B.weight")),
    }
}

/// The key of another tensor; `adapted` tells whether its layer has an adapter.
pub(super) fn plain(name: &str, adapted: bool) -> String {
    let (path, last) = split(name);
    match adapted {
        true => format!("{PREFIX}{path}.base_layer.{last}"),
        false => format!("{PREFIX}{name}"),
    }
}

/// An error if one of these names is a factor's in PEFT's format, which the functions for loralib's
/// do not read.
pub(crate) fn refuse_names<'a>(names: impl IntoIterator<Item = &'a String>) -> Result<()> {
    let factor = |name: &&String| matches!(parse(name), Some(Key::A(..) | Key::B(..)));
    match names.into_iter().find(factor) {
        None => Ok(()),
        Some(name) => Err(Error::tensor(
            name,
            "it is named as in PEFT's format: give its folder to `peft::load_checkpoint` or \
             `peft::load_pretrained`",
        )),
    }
}

/// Whether PEFT would carry this parameter in an adapter with these options.
pub(super) fn is_carried(name: &str, config: &super::PeftConfig) -> bool {
    let (path, last) = split(name);
    let bias = last == "bias" && config.bias != crate::Bias::None;
    let table = last == "weight" && TABLES.contains(&split(path).1);
    bias || table || config.modules_to_save.iter().any(|module| is_within(name, module))
}
