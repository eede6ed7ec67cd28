//! Names of tensors: a dotted path whose last component says what the tensor is.

use crate::layers::{INITIAL_A, INITIAL_B, MAGNITUDE};
use crate::{Error, Result};
use fancy_regex::{Regex, RegexBuilder};

/// Bytes of a compiled expression, which a hostile file must not exceed.
const SIZE_LIMIT: usize = 1 << 20;

/// The path of the layer and the last component.
pub(crate) fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

pub(crate) fn join(layer: &str, last: &str) -> String {
    match layer {
        "" => last.to_owned(),
        layer => format!("{layer}.{last}"),
    }
}

/// Whether `name` is that of a factor.
pub(crate) fn is_factor(name: &str) -> bool {
    matches!(split(name).1, "lora_A" | "lora_B")
}

/// Whether `name` is that of an initial factor, which is frozen and saved.
pub(crate) fn is_initial(name: &str) -> bool {
    matches!(split(name).1, INITIAL_A | INITIAL_B)
}

/// Whether `name` is that of a factor, an initial one, or of DoRA's magnitude.
pub(crate) fn is_lora(name: &str) -> bool {
    is_factor(name) || is_initial(name) || split(name).1 == MAGNITUDE
}

/// Whether this is a tensor of an adapter alone: a factor, the bias of lora_B, or rows of a table.
pub(crate) fn is_adapter(name: &str) -> bool {
    is_lora(name) || matches!(split(name).1, "lora_bias" | "trainable_tokens")
}

/// Whether this is the weight of a layer that has factors too, in an adapter with the names for which `exists` is
/// true. PEFT saves the table of an adapted embedding.
pub(crate) fn is_adapted_weight(name: &str, exists: impl Fn(&str) -> bool) -> bool {
    let (path, last) = split(name);
    last == "weight" && exists(&join(path, "lora_A"))
}

/// Whether `name` has the components of `module`, in a row, somewhere in its path.
pub(crate) fn is_within(name: &str, module: &str) -> bool {
    !module.is_empty() && format!(".{name}.").contains(&format!(".{module}."))
}

/// Whether `path` is `module` or ends in it after a dot. Every path ends in the empty module.
pub(crate) fn ends_in(path: &str, module: &str) -> bool {
    match path.strip_suffix(module) {
        Some(before) => before.is_empty() || before.ends_with('.') || module.is_empty(),
        None => false,
    }
}

/// Compiles `prefix` and then `expression`, to match a whole text.
pub(crate) fn full_match(prefix: &str, expression: &str) -> std::result::Result<Regex, String> {
    compile_between(&format!(r"\A{prefix}(?:"), expression, r")\z")
}

/// Compiles `expression` between two texts that may open and close a group.
pub(crate) fn compile_between(
    before: &str,
    expression: &str,
    after: &str,
) -> std::result::Result<Regex, String> {
    // Alone first, so that the expression's parentheses cannot close those around it.
    let compile = |text: &str| RegexBuilder::new(text).delegate_size_limit(SIZE_LIMIT).build();
    compile(expression)
        .and_then(|_| compile(&format!("{before}{expression}{after}")))
        .map_err(|e| e.to_string())
}

/// The beginning of the names of an optimizer's moments.
pub(crate) const MOMENT: &str = "optimizer.exp_avg";

/// An error if one of these names is a factor's in PEFT's format, or a moment's in the state of a run.
pub(crate) fn refuse_other_names<'a>(names: impl IntoIterator<Item = &'a String>) -> Result<()> {
    let factor = |name: &&String| {
        let (path, last) = split(name);
        let of_peft = matches!(last, "lora_embedding_A" | "lora_embedding_B")
            || (last == "weight" && is_lora(path));
        of_peft && name.starts_with("base_model.model.")
    };
    for name in names {
        if name.starts_with(MOMENT) {
            let reason = "it is the state of a run, which `train::AdamW::load` reads into an optimizer: take the \
                          adapter from `Adapter::save`";
            return Err(Error::tensor(name, reason));
        }
        if factor(&name) {
            let reason =
                "this is a name of PEFT's format: read the folder with `peft::load_adapter` or \
                          `peft::load_pretrained`";
            return Err(Error::tensor(name, reason));
        }
    }
    Ok(())
}

/// An error if one of the missing names is one of the unexpected ones without wrappers.
pub(crate) fn refuse_wrapped_names(unexpected: &[String], missing: &[String]) -> Result<()> {
    let wrapped = |name: &&String| {
        let stripped = without_wrappers(name, name.starts_with("module."));
        stripped != **name && missing.contains(&stripped)
    };
    match unexpected.iter().find(wrapped) {
        None => Ok(()),
        Some(name) => Err(Error::tensor(
            name,
            "the model was compiled or parallel when it was saved, and `_orig_mod` or `module` is in \
             its names: load `strip_wrappers(tensors)`",
        )),
    }
}

/// A name without the components `_orig_mod` and, if the model was `parallel`, without `module.` at its start.
pub(crate) fn without_wrappers(name: &str, parallel: bool) -> String {
    let rest = if parallel { name.strip_prefix("module.").unwrap_or(name) } else { name };
    let components: Vec<_> =
        rest.split('.').filter(|component| *component != "_orig_mod").collect();
    components.join(".")
}
