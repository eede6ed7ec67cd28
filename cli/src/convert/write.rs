//! Writes an adapter in any format.

use super::args::Format;
use super::base::Bases;
use super::Adapter;
use crate::Result;
use lora::formats::{diffusers, kohya, mlx};
use lora::{gguf, peft};
use loralib as lora;
use std::path::Path;

pub fn write(format: Format, out: &Path, (config, tensors): &Adapter, bases: &Bases) -> Result<()> {
    match format {
        Format::Loralib => lora::save_state_dict(tensors, config, out)?,
        Format::Peft => peft::save_pretrained(out, tensors, config)?,
        Format::PeftPlain => peft::save_plain(out, tensors, config)?,
        Format::Diffusers => diffusers::save(out, tensors, config)?,
        Format::Kohya => kohya::save(out, tensors, config)?,
        Format::Mlx => mlx::save(out, tensors, config)?,
        Format::Gguf => {
            let base = bases.gguf.as_ref().ok_or("give the base by --base model.gguf")?;
            gguf::save_adapter(out, tensors, config, base)?
        }
        Format::Torch => return Err("torch's format is only read".into()),
    }
    Ok(())
}
