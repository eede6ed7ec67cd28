//! The options.

use candle_core::quantized::GgmlDType;
use candle_core::DType;
use clap::ValueEnum;
use loralib::layers::LayerKind;
use std::path::PathBuf;

/// Merges a LoRA adapter into its base model
///
/// A folder becomes a folder with all that the base's has, a GGUF file another one or a folder.
#[derive(clap::Args)]
#[command(
    after_help = "Example: lora merge --base Qwen2.5-1.5B-Instruct --adapter adapter --out merged"
)]
pub struct Args {
    /// A folder as the Hugging Face hub gives it, a GGUF file, a checkpoint, or the index of a sharded one
    #[arg(long)]
    pub base: PathBuf,
    /// The adapter: PEFT's or MLX's folder, this crate's file, or llama.cpp's for a GGUF base
    #[arg(long)]
    pub adapter: PathBuf,
    /// The folder or file to write, which must not exist: one that ends in .gguf or .safetensors is a file
    #[arg(long)]
    pub out: PathBuf,
    /// How a GGUF base's merged matrices are stored [default: q8_0 in a GGUF file, bf16 in a folder]
    #[arg(long)]
    pub dtype: Option<Stored>,
    /// Writes a GGUF file even if rounding leaves less than half of an update
    #[arg(long)]
    pub force: bool,
    /// The rank, if the state dict has no configuration
    #[arg(long)]
    pub r: Option<usize>,
    /// The alpha, if the state dict has no configuration
    #[arg(long)]
    pub lora_alpha: Option<f64>,
    /// Layers with a square weight that are Linear, by the end of their path; "" for all
    #[arg(long, value_name = "MODULE")]
    pub linear: Vec<String>,
    /// Layers that are an Embedding, by the end of their path
    #[arg(long, value_name = "MODULE")]
    pub embedding: Vec<String>,
    /// Layers that are a MergedLinear with their enable_lora, as `c_attn=1,0,1`
    #[arg(long, value_name = "MODULE=SPLITS", value_parser = merged_linear)]
    pub merged_linear: Vec<(String, LayerKind)>,
    /// A prefix of the adapter's names that the base's lack, such as `transformer.`
    #[arg(long, default_value = "")]
    pub strip_prefix: String,
}

fn merged_linear(text: &str) -> std::result::Result<(String, LayerKind), String> {
    let (module, splits) = text.split_once('=').ok_or("expected MODULE=1,0,1")?;
    let splits = splits.split(',').map(|split| match split {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(format!("{split:?} is neither 0 nor 1")),
    });
    Ok((module.to_owned(), LayerKind::MergedLinear(splits.collect::<std::result::Result<_, _>>()?)))
}

impl Args {
    pub fn kinds(&self) -> Vec<(String, LayerKind)> {
        let of = |modules: &[String], kind: LayerKind| {
            modules.iter().map(|module| (module.clone(), kind.clone())).collect::<Vec<_>>()
        };
        let (linear, embedding) =
            (of(&self.linear, LayerKind::Linear), of(&self.embedding, LayerKind::Embedding));
        [linear, embedding, self.merged_linear.clone()].concat()
    }
}

/// A dtype of merged weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stored {
    #[value(name = "q8_0")]
    Q8_0,
    F16,
    Bf16,
    F32,
}

impl Stored {
    pub fn in_gguf(self) -> GgmlDType {
        match self {
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::F16 => GgmlDType::F16,
            Self::Bf16 => GgmlDType::BF16,
            Self::F32 => GgmlDType::F32,
        }
    }

    /// `None` for blocks, which safetensors files do not have.
    pub fn dense(self) -> Option<DType> {
        match self {
            Self::Q8_0 => None,
            Self::F16 => Some(DType::F16),
            Self::Bf16 => Some(DType::BF16),
            Self::F32 => Some(DType::F32),
        }
    }
}
