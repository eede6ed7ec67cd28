//! The formats of adapters.

use crate::Result;
use candle_core::Device;
use clap::ValueEnum;
use loralib as lora;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// This crate's file
    Loralib,
    /// A folder of PEFT
    Peft,
    /// A folder of PEFT with one rank, one whole alpha and no rslora
    PeftPlain,
    /// diffusers' file
    Diffusers,
    /// The file of sd-scripts, AUTOMATIC1111 and ComfyUI
    Kohya,
    /// A folder of MLX
    Mlx,
    /// llama.cpp's adapter
    Gguf,
    /// A state dict of torch, which is only read
    #[value(skip)]
    Torch,
}

impl Format {
    /// Whether the names begin with a component; `None` if they may.
    pub fn is_of_pipelines(self) -> Option<bool> {
        match self {
            Self::Diffusers | Self::Kohya => Some(true),
            Self::Loralib | Self::Torch => None,
            _ => Some(false),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Loralib => "this crate's file",
            Self::Peft => "PEFT's folder",
            Self::PeftPlain => "PEFT's folder with plain scaling",
            Self::Diffusers => "diffusers' file",
            Self::Kohya => "kohya's file",
            Self::Mlx => "MLX's folder",
            Self::Gguf => "llama.cpp's adapter",
            Self::Torch => "torch's state dict",
        })
    }
}

/// What lies at a path.
pub enum What {
    Adapter(Format),
    Model,
}

/// The format of the adapter at a path. An error says what else it is, if that is known.
pub fn detect(path: &Path) -> Result<Format> {
    match kind(path)? {
        What::Adapter(format) => Ok(format),
        What::Model => {
            Err(format!("{}: it is a model, expected an adapter", path.display()).into())
        }
    }
}

/// An adapter and its format, or a model.
pub fn kind(path: &Path) -> Result<What> {
    let found = if path.is_dir() { of_folder(path) } else { of_file(path) };
    let found = found.and_then(|format| {
        format.ok_or("it is neither an adapter of a known format nor a model".into())
    });
    found.map_err(|e| match e.downcast_ref::<lora::Error>() {
        Some(_) => e, // It names the file.
        None => format!("{}: {e}", path.display()).into(),
    })
}

fn of_folder(dir: &Path) -> Result<Option<What>> {
    if dir.join("pytorch_lora_weights.safetensors").exists() {
        return Ok(Some(What::Adapter(Format::Diffusers)));
    }
    let config = dir.join("adapter_config.json");
    if !config.exists() {
        return Ok(dir.join("config.json").exists().then_some(What::Model));
    }
    let text = fs::read_to_string(config)?;
    // Some editors put a byte order mark before the text.
    let config: serde_json::Value = serde_json::from_str(text.trim_start_matches('\u{feff}'))
        .map_err(|e| format!("adapter_config.json: {e}"))?;
    let mlx = config.get("lora_parameters").is_some() || config.get("fine_tune_type").is_some();
    Ok(Some(What::Adapter(if mlx { Format::Mlx } else { Format::Peft })))
}

fn of_file(path: &Path) -> Result<Option<What>> {
    let mut magic = vec![];
    File::open(path)?.take(4).read_to_end(&mut magic)?;
    match magic.as_slice() {
        b"GGUF" => return of_gguf(path).map(Some),
        b"PK\x03\x04" => return Ok(Some(What::Adapter(Format::Torch))),
        [] => return Err("it is empty".into()),
        [b'{' | b'[', ..] => return Err("it is JSON, expected an adapter".into()),
        _ => {}
    }
    let names: Vec<_> = lora::read_state_dict(path, &Device::Cpu)?.tensors.into_keys().collect();
    let format = |name: &String| {
        let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
        if ends(&[".lora_A", ".lora_B"]) {
            Some(Format::Loralib)
        } else if ends(&[".lora_down.weight", ".lora_up.weight"]) {
            Some(Format::Kohya)
        } else if ends(&[".lora_A.weight", ".down.weight"]) {
            Some(Format::Diffusers)
        } else {
            None
        }
    };
    Ok(match names.iter().find_map(format) {
        Some(format) => Some(What::Adapter(format)),
        None => names.iter().any(|name| name.ends_with(".weight")).then_some(What::Model),
    })
}

/// Whether a file begins as GGUF's do, whatever its name.
pub fn is_gguf(path: &Path) -> Result<bool> {
    let mut magic = vec![];
    let read = File::open(path).and_then(|file| file.take(4).read_to_end(&mut magic));
    read.map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(magic == b"GGUF")
}

fn of_gguf(path: &Path) -> Result<What> {
    let file = lora::gguf::File::open(path)?;
    let what = file.metadata().get("general.type").and_then(|value| value.to_string().ok());
    Ok(match what.is_some_and(|what| what == "adapter") {
        true => What::Adapter(Format::Gguf),
        false => What::Model,
    })
}
