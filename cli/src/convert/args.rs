//! The options.

use clap::ValueEnum;
use std::fmt;
use std::path::PathBuf;

/// Converts a LoRA adapter to another format
///
/// What was written is read again and compared: a conversion that rounds is refused unless --rounded allows it.
#[derive(clap::Args)]
pub struct Args {
    /// The adapter; its format is detected
    #[arg(long)]
    pub from: PathBuf,
    /// The format to write
    #[arg(long)]
    pub to: Format,
    /// The file or folder to write
    #[arg(long)]
    pub out: PathBuf,
    /// The base: `model.gguf` for llama.cpp's format; for kohya's, whose names have no dots, each model's
    /// safetensors file or index as `unet=diffusion_pytorch_model.safetensors`
    #[arg(long, value_name = "[COMPONENT=]PATH")]
    pub base: Vec<String>,
    /// The component of a pipeline, such as `unet`: taken out of a file of diffusers or kohya, or added to
    /// names for one. For a conversion within these two it leaves the others out
    #[arg(long)]
    pub component: Option<String>,
    /// The entry of torch's file that is the state dict
    #[arg(long)]
    pub entry: Option<String>,
    /// The rank, if the file has no configuration
    #[arg(long)]
    pub r: Option<usize>,
    /// The alpha, if the file has no configuration
    #[arg(long, allow_negative_numbers = true)]
    pub lora_alpha: Option<f64>,
    /// The base's head is not tied to its embedding. Needed where the adapter has factors of the embedding and
    /// one of the two formats is MLX's, in which a tied head follows them
    #[arg(long)]
    pub untied_head: bool,
    /// Allow a conversion that rounds the update
    #[arg(long)]
    pub rounded: bool,
}

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
