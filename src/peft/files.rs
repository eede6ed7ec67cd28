//! The files of a folder in PEFT's format.

use crate::Error;

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const SAFETENSORS: &str = "adapter_model.safetensors";
pub(super) const BIN: &str = "adapter_model.bin";

pub(super) fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "PEFT adapter", reason: reason.to_string() }
}
