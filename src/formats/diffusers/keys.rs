//! The names of tensors in a file of diffusers, in their newest form and in older ones.

use crate::formats::layers::Role;
use crate::formats::peft::adapter_name;
use crate::weights::origin;
use crate::{Error, Result};

/// The meaning of a key.
pub(super) struct Key {
    pub path: String,
    pub role: Role,
}

/// The ends of the factors' names after their layer's path, and those that diffusers expects of a text encoder.
const FACTORS: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
const OF_TEXT_ENCODER: [&str; 2] =
    [".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"];

/// All that are read.
const ENDS: [(&str, Role); 7] = [
    (FACTORS[0], Role::A),
    (FACTORS[1], Role::B),
    (OF_TEXT_ENCODER[0], Role::A),
    (OF_TEXT_ENCODER[1], Role::B),
    (".lora.down.weight", Role::A),
    (".lora.up.weight", Role::B),
    (".alpha", Role::Alpha),
];

/// The layers of an attention under a name of its processor, in a U-Net and in a text encoder.
const PROCESSORS: [(&str, &str, &str); 6] = [
    ("to_q_lora", "to_q", "q_proj"),
    ("to_k_lora", "to_k", "k_proj"),
    ("to_v_lora", "to_v", "v_proj"),
    ("to_out_lora", "to_out.0", "out_proj"),
    ("add_k_proj_lora", "add_k_proj", "add_k_proj"),
    ("add_v_proj_lora", "add_v_proj", "add_v_proj"),
];

/// The keys of a layer's factors. The newer ones of a text encoder without adapted attention are an error in
/// diffusers.
pub(super) fn pair(path: &str) -> [String; 2] {
    let ends = if path.starts_with("text_encoder") { OF_TEXT_ENCODER } else { FACTORS };
    ends.map(|end| format!("{path}{end}"))
}

pub(super) fn parse(key: &str) -> Result<Key> {
    let end = |(end, role): &(&str, Role)| Some((key.strip_suffix(end)?, *role));
    let named = match ENDS.iter().find_map(end) {
        Some((path, role)) => Some(Key { path: path.replace(".processor.", "."), role }),
        None => processor(key),
    };
    let named = named.filter(|_| !is_compiled(key));
    named.ok_or_else(|| Error::tensor(key, reason(key)))
}

/// Whether the model was compiled when it was saved.
fn is_compiled(key: &str) -> bool {
    key.split('.').any(|component| component == "_orig_mod")
}

/// Why a key is none of diffusers', and what to do.
fn reason(key: &str) -> String {
    if is_compiled(key) {
        return "the model was compiled when it was saved: remove `_orig_mod` from the names"
            .to_owned();
    }
    if let Some(adapter) = adapter_name(key) {
        return format!(
            "it has the adapter's name {adapter:?}, as in a model's `state_dict()`: remove this component \
             from the names"
        );
    }
    origin(key).unwrap_or("its name is not one of a LoRA adapter in diffusers' format").to_owned()
}

/// `unet.<attention>.processor.to_q_lora.down.weight`.
fn processor(key: &str) -> Option<Key> {
    let (path, role) = match key.strip_suffix(".down.weight") {
        Some(path) => (path, Role::A),
        None => (key.strip_suffix(".up.weight")?, Role::B),
    };
    let (attention, last) = path.rsplit_once('.')?;
    let attention = attention.strip_suffix(".processor").unwrap_or(attention);
    let (_, unet, encoder) = PROCESSORS.into_iter().find(|(name, ..)| *name == last)?;
    let own = if attention.starts_with("text_encoder") { encoder } else { unet };
    Some(Key { path: format!("{attention}.{own}"), role })
}
