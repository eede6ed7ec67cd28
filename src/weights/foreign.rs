//! Names of other formats among an adapter's tensors.

use crate::layers::Part;
use crate::{Error, Result};

/// The beginning of the names of an optimizer's moments.
pub(crate) const MOMENT: &str = "optimizer.exp_avg";

/// An error if one of these names is a factor's in PEFT's format, or a moment's in the state of a run.
pub(crate) fn refuse_other_names<'a>(names: impl IntoIterator<Item = &'a String>) -> Result<()> {
    for name in names {
        if name.starts_with(MOMENT) {
            let reason = "it is the state of a run, which `train::AdamW::load` reads into an optimizer: take the \
                          adapter from `Adapter::save`";
            return Err(Error::tensor(name, reason));
        }
        if name.starts_with("base_model.model.") && is_factor_of_peft(name) {
            let reason = "this is a name of PEFT's format: read the folder by `Adapter::load` or \
                          `formats::peft::load`";
            return Err(Error::tensor(name, reason));
        }
    }
    Ok(())
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
