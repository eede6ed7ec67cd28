//! The files of a folder in PEFT's format.

use crate::{Error, Result};
use std::path::{Path, PathBuf};

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const SAFETENSORS: &str = "adapter_model.safetensors";
pub(super) const BIN: &str = "adapter_model.bin";

/// An error for a folder of another program.
pub(super) fn refuse_others(dir: &Path) -> Result<()> {
    if [SAFETENSORS, BIN].iter().any(|file| dir.join(file).exists()) {
        return Ok(());
    }
    for (file, program, module) in [
        ("adapters.safetensors", "MLX", "mlx"),
        ("pytorch_lora_weights.safetensors", "diffusers", "diffusers"),
    ] {
        if dir.join(file).exists() {
            let reason =
                format!("it is a folder of {program}: read it by `formats::{module}::load`");
            return Err(Error::Invalid(reason).at(dir));
        }
    }
    Ok(())
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
