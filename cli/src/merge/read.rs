//! The adapter.

use super::args::Args;
use crate::adapter;
use crate::encoder::{self, is_encoder};
use crate::format::{detect, Format};
use crate::Result;
use candle_core::Device;
use lora::adapter::AdapterConfig;
use lora::layers::LayerKind;
use lora::utils::{Checkpoint, StateDict};
use lora::{gguf, LoraConfig, LoraWeights};
use loralib as lora;

/// The adapter with the base's names.
pub fn read(args: &Args, base: Option<&gguf::File>) -> Result<LoraWeights> {
    let weights = of_any_format(args, base)?;
    let prefix = &args.strip_prefix[..];
    if !prefix.is_empty() {
        let strip = |name: &str| name.strip_prefix(prefix).unwrap_or(name).to_owned();
        return renamed(weights, strip);
    }
    if is_encoder(&args.base) {
        // An encoder's names have a prefix in a model with a head alone.
        let names = encoder::names(&args.base)?;
        return renamed(weights, |name| names.on_disk(name));
    }
    Ok(weights)
}

fn of_any_format(args: &Args, base: Option<&gguf::File>) -> Result<LoraWeights> {
    if !matches!(detect(&args.adapter)?, Format::Loralib | Format::Torch) {
        if args.r.is_some() || args.lora_alpha.is_some() {
            return Err("the adapter has a rank and an alpha: omit --r and --lora-alpha".into());
        }
        let weights = adapter::read(&args.adapter, base)?;
        let with_kind = |weights: LoraWeights, (module, kind): (String, LayerKind)| {
            weights.with_kind(&module, kind)
        };
        return Ok(args.kinds().into_iter().try_fold(weights, with_kind)?);
    }
    let Checkpoint { tensors, config } = lora::read_state_dict(&args.adapter, &Device::Cpu)?;
    let config = match (config, args.r, args.lora_alpha) {
        (Some(config), None, None) => config,
        (None, Some(r), Some(lora_alpha)) => {
            LoraConfig { r, lora_alpha, ..Default::default() }.into()
        }
        (Some(_), ..) => {
            return Err("the file has a rank and an alpha: omit --r and --lora-alpha".into())
        }
        (None, ..) => {
            return Err("the file has no rank and alpha: give --r and --lora-alpha".into())
        }
    };
    let with_layer = |config: AdapterConfig, (module, kind)| config.with_layer(module, kind);
    let config = args.kinds().into_iter().fold(config, with_layer);
    let weights = LoraWeights::new(config, tensors);
    Ok(weights.map_err(|e| format!("{}: {e}", args.adapter.display()))?)
}

fn renamed(weights: LoraWeights, rename: impl Fn(&str) -> String) -> Result<LoraWeights> {
    let mut config = weights.config();
    let layers = config.layers.into_iter();
    config.layers = layers.map(|(path, own)| (rename(&path), own)).collect();
    let rows = config.trainable_token_indices.into_iter();
    config.trainable_token_indices = rows.map(|(path, own)| (rename(&path), own)).collect();
    let tensors = weights.state_dict().into_iter();
    let tensors: StateDict = tensors.map(|(name, tensor)| (rename(&name), tensor)).collect();
    Ok(LoraWeights::new(config, tensors)?)
}
