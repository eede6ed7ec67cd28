//! Reads an adapter of any format.

use super::args::Args;
use super::base::Bases;
use crate::format::Format;
use crate::report::Report;
use crate::Result;
use candle_core::Device;
use lora::files::{read_torch_entry, strip_wrappers};
use lora::formats::{diffusers, kohya, mlx, peft};
use lora::layers::LayerKind;
use lora::utils::{Checkpoint, StateDict};
use lora::{gguf, LoraConfig, LoraWeights};
use loralib as lora;
use serde_json::json;
use std::path::Path;

const CPU: Device = Device::Cpu;

/// Reads the adapter of `--from`, with the options that say what its file does not.
pub fn read(format: Format, args: &Args, bases: &Bases, report: Report) -> Result<LoraWeights> {
    let path = &args.from;
    let given = match (args.r, args.lora_alpha) {
        (Some(r), Some(lora_alpha)) => Some(LoraConfig { r, lora_alpha, ..Default::default() }),
        _ => None,
    };
    let Checkpoint { tensors, config } = match format {
        Format::Torch => {
            Checkpoint { tensors: torch(path, args.entry.as_deref(), report)?, config: None }
        }
        _ if args.entry.is_some() => {
            return Err(format!("{format} has no entries: leave --entry out").into())
        }
        Format::Loralib => lora::read_state_dict(path, &CPU)?,
        format => {
            refuse_size(args)?;
            return load(format, path, bases);
        }
    };
    if config.is_some() {
        refuse_size(args)?;
    }
    let config = config.or(given.map(Into::into));
    let config = config.ok_or("the file has no rank and alpha: give --r and --lora-alpha")?;
    let at = |reason: String| format!("{}: {reason}", path.display());
    if !tensors.keys().any(|name| name.ends_with("lora_A")) {
        let first = tensors.keys().next().map_or("nothing", String::as_str);
        let reason = format!("it has no lora_A, but {first}; give PEFT's file by its folder");
        return Err(at(reason).into());
    }
    Ok(LoraWeights::new(config, tensors).map_err(|e| at(e.to_string()))?)
}

fn refuse_size(args: &Args) -> std::result::Result<(), &'static str> {
    match args.r.is_some() || args.lora_alpha.is_some() {
        true => Err("the adapter has a rank and an alpha: leave --r and --lora-alpha out"),
        false => Ok(()),
    }
}

fn torch(path: &Path, entry: Option<&str>, report: Report) -> Result<StateDict> {
    let tensors = match entry {
        Some(entry) => read_torch_entry(path, entry, &CPU)?,
        None => lora::read_state_dict(path, &CPU)?.tensors,
    };
    let stripped = strip_wrappers(tensors.clone())?;
    if !stripped.keys().eq(tensors.keys()) {
        let line = "the names of torch's wrappers are removed: `_orig_mod`, `module`";
        report.tell(line, "renamed", json!({ "removed": ["_orig_mod", "module"] }));
    }
    Ok(stripped)
}

/// Reads what was written, with the fused layers of `written`, which PEFT's format does not have.
pub fn read_again(
    format: Format,
    path: &Path,
    written: &LoraWeights,
    bases: &Bases,
) -> Result<LoraWeights> {
    let mut again = load(format, path, bases)?;
    if matches!(format, Format::Peft | Format::PeftPlain) {
        for (path, layer) in written.layers() {
            use LayerKind::{MergedLinear, MergedSplits};
            if let Some(kind @ (MergedLinear(_) | MergedSplits(_))) = &layer.kind {
                again = again.with_kind(path, kind.clone())?;
            }
        }
    }
    Ok(again)
}

fn load(format: Format, path: &Path, bases: &Bases) -> Result<LoraWeights> {
    Ok(match format {
        Format::Peft | Format::PeftPlain => peft::load(path, &CPU)?,
        Format::Diffusers => diffusers::load(path, &CPU)?,
        Format::Kohya if bases.names.is_empty() => {
            return Err(
                "the file's names have no dots: give those of each base, as --base unet=PATH or \
                        --base text_encoder=PATH"
                    .into(),
            )
        }
        Format::Kohya => kohya::with_paths(&kohya::load(path, &CPU)?, &bases.names)
            .map_err(|e| format!("{}: {e}", path.display()))?,
        Format::Mlx => mlx::load(path, &CPU)?,
        Format::Gguf => gguf::load_adapter(path, bases.gguf()?, &CPU)?,
        Format::Loralib | Format::Torch => {
            let Checkpoint { tensors, config } = lora::read_state_dict(path, &CPU)?;
            LoraWeights::new(config.ok_or("the file has no configuration")?, tensors)?
        }
    })
}
