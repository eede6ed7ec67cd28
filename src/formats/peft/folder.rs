//! The files of a folder in PEFT's format.

use crate::Error;
use std::path::{Path, PathBuf};

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const SAFETENSORS: &str = "adapter_model.safetensors";
pub(super) const BIN: &str = "adapter_model.bin";

/// Whether a folder has the tensors of an adapter in PEFT's format.
pub(crate) fn has_tensors(dir: &Path) -> bool {
    [SAFETENSORS, BIN].iter().any(|file| dir.join(file).exists())
}

/// The configuration's file, given it or its folder.
pub(crate) fn config_file(path: &Path) -> PathBuf {
    if path.is_dir() {
        path.join(CONFIG)
    } else {
        path.to_owned()
    }
}

pub(crate) fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "PEFT adapter", reason: reason.to_string() }
}
