//! Writes an adapter in any format.

use super::base::Bases;
use crate::format::Format;
use crate::Result;
use lora::formats::{diffusers, kohya, mlx, peft};
use lora::{gguf, LoraWeights};
use loralib as lora;
use std::path::Path;

pub fn write(format: Format, out: &Path, weights: &LoraWeights, bases: &Bases) -> Result<()> {
    match format {
        Format::Loralib => lora::save_state_dict(&weights.state_dict(), weights.config(), out)?,
        Format::Peft => peft::save(out, weights)?,
        Format::PeftPlain => peft::save_plain(out, weights)?,
        Format::Diffusers => diffusers::save(out, weights)?,
        Format::Kohya => kohya::save(out, weights)?,
        Format::Mlx => mlx::save(out, weights)?,
        Format::Gguf => gguf::save_adapter(out, weights, bases.gguf()?)?,
        Format::Torch => return Err("torch's format is only read".into()),
    }
    Ok(())
}
