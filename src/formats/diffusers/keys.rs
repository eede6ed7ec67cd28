//! The names of tensors in a file of diffusers, in their newest form and in older ones.

use crate::formats::pairs::Part;
use crate::utils::names::{is_lora, join, split};
use crate::{Error, Result};

/// The meaning of a key.
pub(super) struct Key {
    pub path: String,
    pub part: Part,
}

/// The ends of the factors' names after their layer's path, and those that diffusers expects of a text encoder.
const FACTORS: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
const OF_TEXT_ENCODER: [&str; 2] =
    [".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"];

/// All that are read.
const ENDS: [(&str, Part); 7] = [
    (FACTORS[0], Part::A),
    (FACTORS[1], Part::B),
    (OF_TEXT_ENCODER[0], Part::A),
    (OF_TEXT_ENCODER[1], Part::B),
    (".lora.down.weight", Part::A),
    (".lora.up.weight", Part::B),
    (".alpha", Part::Alpha),
];

/// The layers of an attention under a name of its processor, in a U-Net and in a text encoder.
const PROCESSORS: [(&str, &str, &str); 4] = [
    ("to_q_lora", "to_q", "q_proj"),
    ("to_k_lora", "to_k", "k_proj"),
    ("to_v_lora", "to_v", "v_proj"),
    ("to_out_lora", "to_out.0", "out_proj"),
];

/// The keys of a layer's factors. The newer ones of a text encoder without adapted attention are an error in
/// diffusers.
pub(super) fn pair(path: &str) -> [String; 2] {
    let ends = if path.starts_with("text_encoder") { OF_TEXT_ENCODER } else { FACTORS };
    ends.map(|end| format!("{path}{end}"))
}

pub(super) fn parse(key: &str) -> Result<Key> {
    let end = |(end, part): &(&str, Part)| Some((key.strip_suffix(end)?, *part));
    if let Some((path, part)) = ENDS.iter().find_map(end) {
        return Ok(Key { path: path.replace(".processor.", "."), part });
    }
    processor(key).ok_or_else(|| {
        let reason = match is_lora(key) {
            true => "this is a name of loralib's format: read the file with `read_adapter`",
            false => "its name is not one of a LoRA adapter in diffusers' format",
        };
        Error::tensor(key, reason)
    })
}

/// `unet.<attention>.processor.to_q_lora.down.weight`.
fn processor(key: &str) -> Option<Key> {
    let (path, part) = match key.strip_suffix(".down.weight") {
        Some(path) => (path, Part::A),
        None => (key.strip_suffix(".up.weight")?, Part::B),
    };
    let (attention, last) = split(path);
    let attention = attention.strip_suffix(".processor").unwrap_or(attention);
    let (_, unet, encoder) = PROCESSORS.into_iter().find(|(name, ..)| *name == last)?;
    let own = if attention.starts_with("text_encoder") { encoder } else { unet };
    Some(Key { path: join(attention, own), part })
}
