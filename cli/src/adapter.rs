//! Adapters of any format for a model.

use crate::format::{detect, Format};
use crate::Result;
use candle_core::Device;
use lora::formats::{mlx, peft};
use lora::utils::Checkpoint;
use lora::{gguf, LoraWeights};
use loralib as lora;
use std::path::Path;

/// The adapter at `path`: PEFT's or MLX's folder, this crate's file, or llama.cpp's, which needs the model's own file.
pub fn read(path: &Path, model: Option<&gguf::File>) -> Result<LoraWeights> {
    let cpu = Device::Cpu;
    let at = |reason: &str| format!("{}: {reason}", path.display());
    match detect(path)? {
        Format::Peft | Format::PeftPlain => Ok(peft::load(path, &cpu)?),
        Format::Mlx => Ok(mlx::load(path, &cpu)?),
        Format::Loralib => {
            let Checkpoint { tensors, config } = lora::read_state_dict(path, &cpu)?;
            let config =
                config.ok_or_else(|| at("it has no rank and alpha: see `lora convert`"))?;
            Ok(LoraWeights::new(config, tensors).map_err(|e| at(&e.to_string()))?)
        }
        Format::Gguf => match model {
            Some(model) => Ok(gguf::load_adapter(path, model, &cpu)?),
            None => Err(at("llama.cpp's adapter is for a GGUF model: see `lora convert`").into()),
        },
        other => {
            Err(at(&format!("it is {other}: `lora convert` makes PEFT's folder of it")).into())
        }
    }
}
