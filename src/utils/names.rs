//! Names of tensors: a path of components with dots between, the last of which tells what a tensor is.

/// The layer and the last component of a name.
pub(crate) fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

pub(crate) fn join(layer: &str, last: &str) -> String {
    match layer {
        "" => last.to_owned(),
        layer => format!("{layer}.{last}"),
    }
}

pub(crate) fn is_lora(name: &str) -> bool {
    matches!(split(name).1, "lora_A" | "lora_B")
}

pub(crate) fn is_within(name: &str, module: &str) -> bool {
    !module.is_empty() && format!(".{name}.").contains(&format!(".{module}."))
}
