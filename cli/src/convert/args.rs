//! The options.

use crate::format::Format;
use clap::ValueEnum;
use lora::adapter::ExpertNames;
use loralib as lora;
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
    /// The rank of each layer in the new file: the nearest update of it, by a singular value decomposition
    #[arg(long, value_name = "RANK")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub resize: Option<u32>,
    /// Factors of each expert's matrices in place of those of fused experts (PEFT's target_parameters), by the names that
    /// the model has: projections (experts.0.gate_proj), or mixtral (block_sparse_moe.experts.0.w1)
    #[arg(long, value_name = "NAMES", value_enum)]
    pub split_experts: Option<Experts>,
    /// Factors of fused experts, of which a module has N, in place of those of each expert's matrices
    #[arg(long, value_name = "N", conflicts_with = "split_experts")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub fuse_experts: Option<u32>,
    /// The base's head is not tied to its embedding. Needed where the adapter has factors of the embedding and
    /// one of the two formats is MLX's, in which a tied head follows them
    #[arg(long)]
    pub untied_head: bool,
    /// Allow a conversion that rounds the update
    #[arg(long)]
    pub rounded: bool,
}

/// What the matrices of single experts are called
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Experts {
    Projections,
    Mixtral,
}

impl From<Experts> for ExpertNames {
    fn from(names: Experts) -> Self {
        match names {
            Experts::Projections => Self::Projections,
            Experts::Mixtral => Self::Mixtral,
        }
    }
}
