//! The names of tensors in a PEFT file.

use crate::layers::is_within;
use crate::weights::{origin, AdapterConfig, Bias};
use std::iter::successors;

const MAGNITUDE: &str = "lora_magnitude_vector";

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
    /// The bias of the factor B of a layer.
    BiasOfB(&'a str),
    /// DoRA's magnitude of a layer.
    Magnitude(&'a str),
    /// Rows of a table, by the table's path.
    Tokens(&'a str),
    /// What only training needs.
    Training,
    /// A parameter of the layer under the adapter.
    Base(&'a str, &'a str),
    /// Any other parameter.
    Other(&'a str),
}

/// The path of the parent, and the last component.
pub(super) fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

pub(super) fn parse(key: &str) -> Option<Key<'_>> {
    let name = key.strip_prefix(PREFIX)?;
    let (path, last) = split(name);
    Some(match (last, split(path)) {
        ("lora_embedding_A", _) => Key::A(path, true),
        ("lora_embedding_B", _) => Key::B(path, true),
        ("weight", (path, "lora_A")) => Key::A(path, false),
        ("weight", (path, "lora_B")) => Key::B(path, false),
        ("bias", (path, "lora_B")) => Key::BiasOfB(path),
        // PEFT saves it by the shorter name.
        (MAGNITUDE, _) => Key::Magnitude(path),
        ("weight", (path, MAGNITUDE)) => Key::Magnitude(path),
        ("trainable_tokens_delta", (path, "token_adapter")) => Key::Tokens(path),
        ("lora_velora_embed", _) => Key::Training,
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

pub(super) fn bias_of_b(path: &str) -> String {
    format!("{PREFIX}{path}.lora_B.bias")
}

pub(super) fn magnitude(path: &str) -> String {
    format!("{PREFIX}{path}.{MAGNITUDE}")
}

pub(super) fn tokens(path: &str) -> String {
    format!("{PREFIX}{path}.token_adapter.trainable_tokens_delta")
}

/// The path in keys of the `inner`-th wrapper inside the outermost, around the parameters of a module.
pub(super) fn wrapper(module: &str, inner: usize) -> String {
    format!("{module}{}", ".base_layer".repeat(inner))
}

/// The module of a wrapper, and how many wrappers are around it.
pub(super) fn wrapped(mut path: &str) -> (&str, usize) {
    let mut outer = 0;
    while let Some(wrapper) = path.strip_suffix(".base_layer") {
        (path, outer) = (wrapper, outer + 1);
    }
    (path, outer)
}

/// The adapter's name in a key, as a model's `state_dict()` has it.
pub(crate) fn adapter_name(key: &str) -> Option<&str> {
    let mut components = key.split('.').skip_while(|component| {
        !matches!(
            *component,
            "lora_A" | "lora_B" | "lora_embedding_A" | "lora_embedding_B" | MAGNITUDE
        )
    });
    components.nth(1).filter(|name| !matches!(*name, "weight" | "bias"))
}

/// Whether a key has the adapter's name.
pub(super) fn names_adapter(key: &str) -> bool {
    adapter_name(key).is_some()
}

/// Why a key is no part of an adapter in PEFT's format, and what to do.
pub(super) fn reason(key: &str) -> String {
    let prefix = ["_orig_mod.", "module."].into_iter().find(|prefix| key.starts_with(prefix));
    match (prefix, adapter_name(key)) {
        (Some(prefix), _) => {
            format!("the model was wrapped when it was saved: remove {prefix:?} from the names")
        }
        (_, Some(adapter)) => format!(
            "it has the adapter's name {adapter:?}, as in a model's `state_dict()`: save the adapter by \
             `save_pretrained`, or remove this component from the names"
        ),
        _ => origin(key).unwrap_or("its name is not one of a LoRA adapter in PEFT's format").to_owned(),
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

/// `modules_to_save` by PEFT's rule: a name means every module whose path ends in it, also within a component, so that
/// `head` means `lm_head` too. This crate compares whole components: names of modules that are in the file stay, others
/// become the paths of the modules that end in them. PEFT lists heads by the task, also those that the model lacks.
pub(super) fn modules_in_file<'a>(
    names: &[String],
    file: impl Iterator<Item = &'a String>,
) -> Vec<String> {
    let (mut used, mut found) = (vec![], vec![]);
    for key in file {
        let Some(Key::Other(name)) = parse(key) else { continue };
        if let Some(module) = names.iter().find(|module| is_within(name, module)) {
            used.push(module);
            continue;
        }
        let ends = |path: &&str| names.iter().any(|module| path.ends_with(module));
        let modules = successors(Some(split(name).0), |path| Some(split(path).0));
        let path = modules.take_while(|path| !path.is_empty()).find(ends).map(str::to_owned);
        found.extend(path.filter(|path| !found.contains(path)));
    }
    names.iter().filter(|name| used.contains(name)).cloned().chain(found).collect()
}
