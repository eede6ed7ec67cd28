//! Names of other formats among an adapter's tensors.

use super::component::has_component;
use crate::layers::Part;
use crate::{Error, Result};

/// The beginning of the names of an optimizer's moments.
pub(crate) const MOMENT: &str = "optimizer.exp_avg";

/// What can be done with what no format here has.
const MERGE_ELSEWHERE: &str = "merge it by the program that trained it";

/// An error if one of these names is a factor's in PEFT's format, or a moment's in the state of a run.
pub(crate) fn refuse_other_names<'a>(names: impl IntoIterator<Item = &'a String>) -> Result<()> {
    let is_other = |name: &&String| {
        name.starts_with(MOMENT)
            || (name.starts_with("base_model.model.") && is_factor_of_peft(name))
    };
    match names.into_iter().find(is_other).and_then(|name| Some((name, origin(name)?))) {
        Some((name, reason)) => Err(Error::tensor(name, reason)),
        None => Ok(()),
    }
}

/// Which format a tensor's name is of, and what reads it. A reader that does not know a name says this: so its message
/// never leads to one that does not know it either.
pub(crate) fn origin(name: &str) -> Option<&'static str> {
    let own =
        "this is a name of loralib's format: read the file by `Adapter::load` or `load_checkpoint`";
    foreign_origin(name).or(Part::parse(name).1.is_lora().then_some(own))
}

/// The [`origin`] of a file with these names: of one that nothing reads, if there is one. Not this crate's own format.
pub(crate) fn foreign_file<'a>(
    names: impl Iterator<Item = &'a String>,
) -> Option<(&'a String, &'static str)> {
    let origins = names.filter_map(|name| Some((name, foreign_origin(name)?)));
    origins.max_by_key(|(_, reason)| reason.contains(MERGE_ELSEWHERE))
}

/// An error if one of these names is of a method that no format here has.
pub(crate) fn refuse_other_methods<'a>(names: impl Iterator<Item = &'a String>) -> Result<()> {
    match foreign_file(names).filter(|(_, reason)| reason.contains(MERGE_ELSEWHERE)) {
        Some((name, reason)) => Err(Error::tensor(name, reason)),
        None => Ok(()),
    }
}

/// [`origin`], unless it is this crate's own format.
fn foreign_origin(name: &str) -> Option<&'static str> {
    let (path, last) = name.rsplit_once('.').unwrap_or(("", name));
    let has =
        |parts: &[&str]| name.split('.').any(|own| parts.iter().any(|part| own.starts_with(part)));
    let ends = |parts: &[&str]| parts.iter().any(|part| name.ends_with(part));
    if name.starts_with(MOMENT) {
        return Some(
            "it is the state of a run, which `train::AdamW::load` reads into an optimizer: take the adapter from \
             `Adapter::save`",
        );
    }
    if has(&["hada_", "lokr_", "oft_", "lora_mid", "dora_scale"]) {
        return Some(
            "this is a name of LyCORIS' (LoHa, LoKr, LoCon with lora_mid, OFT, dora_scale), which no format here has: \
             merge it by the program that trained it",
        );
    }
    if has(&["ia3_", "on_input"]) {
        return Some("this is a name of (IA)\u{b3}, which is not LoRA: merge it by the program that trained it");
    }
    if ends(&[".lora_down.weight", ".lora_up.weight"]) {
        // A flattened name has no dots before.
        let is_flat = path.rsplit_once('.').is_some_and(|(layer, _)| !layer.contains('.'));
        return Some(match is_flat {
            true => "this is a name of kohya's: read the file by `formats::kohya::load`",
            false => {
                "this is a name of ComfyUI's with dots, which no format here has: rename lora_down to lora_A and \
                 lora_up to lora_B, begin it with `unet.` or `transformer.`, and read the file by \
                 `formats::diffusers::load`"
            }
        });
    }
    if matches!(last, "lora_a" | "lora_b") {
        return Some("this is a name of MLX's: read the folder by `formats::mlx::load`");
    }
    if name.starts_with("base_model.model.") && is_factor_of_peft(name) {
        return Some(
            "this is a name of PEFT's format: read the folder by `Adapter::load` or `formats::peft::load`",
        );
    }
    let diffusers = [
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ];
    let is_diffusers = ends(&diffusers) && has_component(path);
    is_diffusers
        .then_some("this is a name of diffusers: read the file by `formats::diffusers::load`")
}

/// What to do about the path of a layer that is one of kohya's files, without dots.
pub(crate) fn flattened_hint(path: &str) -> Option<&'static str> {
    let is_flattened = path.starts_with("lora_") && !path.contains('.');
    is_flattened.then_some(
        "this is a flattened name of kohya's: `kohya::with_paths` gives the layer's path",
    )
}

fn is_factor_of_peft(name: &str) -> bool {
    match Part::parse(name) {
        (_, Part::Base("lora_embedding_A" | "lora_embedding_B")) => true,
        (path, Part::Base("weight")) => Part::parse(path).1.is_lora(),
        _ => false,
    }
}
