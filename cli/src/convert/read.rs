//! Reads an adapter of any format.

use super::args::{Args, Format};
use super::base::Bases;
use super::Adapter;
use crate::Result;
use candle_core::Device;
use lora::formats::{diffusers, kohya, mlx};
use lora::{gguf, peft, AdapterConfig, LoraConfig};
use loralib as lora;
use std::path::Path;

const CPU: Device = Device::Cpu;

pub fn read(format: Format, path: &Path, args: &Args, bases: &Bases) -> Result<Adapter> {
    let given = || match (args.r, args.lora_alpha) {
        (Some(r), Some(lora_alpha)) => {
            Ok(AdapterConfig::from(LoraConfig { r, lora_alpha, ..Default::default() }))
        }
        _ => Err("the file has no rank and alpha: give --r and --lora-alpha"),
    };
    let refuse = |given: bool, option: &str, reason: &str| match given {
        true => Err(format!("{reason}: leave {option} out")),
        false => Ok(()),
    };
    let entry = format!("{format} has no entries");
    refuse(args.entry.is_some() && format != Format::Torch, "--entry", &entry)?;
    let sized = |known: bool| {
        let given = args.r.is_some() || args.lora_alpha.is_some();
        refuse(given && known, "--r and --lora-alpha", "the adapter has a rank and an alpha")
    };
    match format {
        Format::Torch => {
            let tensors = match &args.entry {
                Some(entry) => lora::read_torch_entry(path, entry, &CPU)?,
                None => lora::read_state_dict(path, &CPU)?.tensors,
            };
            let stripped = lora::strip_wrappers(tensors.clone())?;
            if !stripped.keys().eq(tensors.keys()) {
                println!("the names of torch's wrappers are removed: `_orig_mod`, `module`");
            }
            Ok((given()?, stripped))
        }
        Format::Loralib => {
            let (config, tensors) = lora::read_adapter(path, &CPU)?;
            sized(config.is_some())?;
            Ok((config.map_or_else(given, Ok)?, tensors))
        }
        format => {
            sized(true)?;
            read_again(format, path, &AdapterConfig::default(), bases)
        }
    }
}

/// Reads what was written, with the kinds of its layers, which PEFT's format does not have.
pub fn read_again(
    format: Format,
    path: &Path,
    written: &AdapterConfig,
    bases: &Bases,
) -> Result<Adapter> {
    Ok(match format {
        Format::Peft | Format::PeftPlain => {
            let kind = |(path, layer): (&String, &lora::LayerConfig)| {
                layer.kind.clone().map(|kind| (path.clone(), kind))
            };
            let kinds: Vec<_> = written.layers.iter().filter_map(kind).collect();
            peft::load_pretrained_as(path, &kinds, &CPU)?
        }
        Format::Diffusers => diffusers::load(path, &CPU)?,
        Format::Kohya if bases.names.is_empty() => {
            return Err(
                "the file's names have no dots: give those of each base, as --base unet=PATH or \
                        --base text_encoder=PATH"
                    .into(),
            )
        }
        Format::Kohya => kohya::load(path, &bases.names, &CPU)?,
        Format::Mlx => mlx::load(path, &CPU)?,
        Format::Gguf => {
            let base = bases.gguf.as_ref().ok_or("give the base by --base model.gguf")?;
            gguf::load_adapter(path, base, &CPU)?
        }
        Format::Loralib | Format::Torch => {
            let (config, tensors) = lora::read_adapter(path, &CPU)?;
            (config.ok_or("the file has no configuration")?, tensors)
        }
    })
}
