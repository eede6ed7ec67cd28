//! The flags.

use crate::task::Method;
use crate::Result;
use clap::{Parser, ValueEnum};
use loralib::train::Pooling;
use loralib::{Bias, LoraConfig};
use std::path::{Path, PathBuf};

/// Fine-tunes a BERT or RoBERTa to tell kinds of sentences apart, with LoRA and otherwise.
///
/// Data are lines of `label<tab>sentence`.
#[derive(Parser)]
pub struct Args {
    /// A folder as the Hugging Face hub gives it: config.json, model.safetensors, tokenizer.json
    #[arg(long, value_name = "FOLDER")]
    pub model: Option<PathBuf>,
    /// Sentences to train on
    #[arg(long, value_name = "FILE")]
    pub train: Option<PathBuf>,
    /// Sentences to measure on
    #[arg(long, value_name = "FILE")]
    pub valid: Option<PathBuf>,
    /// What is trained
    #[arg(long, value_enum, default_value_t = Choice::Lora)]
    pub method: Choice,
    /// The adapter's rank
    #[arg(long, value_name = "R", default_value_t = 8)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub rank: u32,
    /// The adapter's strength: its update is scaled by alpha / rank
    #[arg(long, default_value_t = 16.)]
    pub alpha: f64,
    /// The probability with which a value of the adapter's input is dropped in training
    #[arg(long, value_name = "P", default_value_t = 0.)]
    pub dropout: f32,
    /// The biases to train with the adapter: none, all or lora_only
    #[arg(long, default_value = "none")]
    pub bias: Bias,
    /// The layers to adapt, of query, key, value and dense
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "query,value")]
    #[arg(value_parser = ["query", "key", "value", "dense"])]
    pub targets: Vec<String>,
    /// How a sentence's tokens become one vector: mean, or cls for the first one, [CLS] or <s>
    #[arg(long, default_value_t = Pooling::Mean)]
    pub pooling: Pooling,
    /// Passes over the training sentences
    #[arg(long, value_name = "N", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: u32,
    /// The learning rate at its peak [default: lora 4e-3, head 1e-2, full 4e-4]
    #[arg(long)]
    pub lr: Option<f64>,
    /// Sentences per step
    #[arg(long, value_name = "N", default_value_t = 32)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Tokens behind which a sentence is cut off
    #[arg(long, value_name = "N", default_value_t = 128)]
    #[arg(value_parser = clap::value_parser!(u32).range(3..))]
    pub max_length: u32,
    /// Seed of the order of sentences and of new weights; dropout on the CPU is not seeded
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    pub device: Place,
    /// The folder for METHOD.safetensors, METHOD.json and report.json
    #[arg(long, value_name = "FOLDER", default_value = "target/classify")]
    pub out: PathBuf,
    /// Only measures what --method left in --out on --valid, merged and unmerged
    #[arg(long, conflicts_with = "predict")]
    pub evaluate: bool,
    /// Only tells the label of this sentence, with what --method left in --out
    #[arg(long, value_name = "TEXT")]
    pub predict: Option<String>,
    /// A few seconds with a tiny random model and text, which it writes to --out
    #[arg(long, conflicts_with_all = ["model", "train", "valid", "evaluate", "predict"])]
    pub quick: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// An adapter and a head, the encoder frozen
    Lora,
    /// A head on the frozen encoder
    Head,
    /// Everything
    Full,
    /// The three in turn, side by side
    All,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Place {
    Cpu,
    Cuda,
}

impl Choice {
    /// The methods, the one that needs the least memory first.
    pub fn methods(self) -> &'static [Method] {
        match self {
            Self::Lora => &[Method::Lora],
            Self::Head => &[Method::Head],
            Self::Full => &[Method::Full],
            Self::All => &[Method::Head, Method::Lora, Method::Full],
        }
    }

    /// The one method.
    pub fn one(self) -> Result<Method> {
        match self.methods() {
            &[method] => Ok(method),
            _ => Err("--method all: one checkpoint at a time, please".into()),
        }
    }
}

impl Args {
    pub fn model(&self) -> Result<&Path> {
        given(&self.model)
    }

    pub fn train(&self) -> Result<&Path> {
        given(&self.train)
    }

    pub fn valid(&self) -> Result<&Path> {
        given(&self.valid)
    }

    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            r: self.rank as usize,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            ..Default::default()
        }
    }
}

fn given(path: &Option<PathBuf>) -> Result<&Path> {
    let usage = "--model takes the folder of a BERT or RoBERTa from the Hugging Face hub, with \
                 config.json, model.safetensors and tokenizer.json\n       --train and --valid take files of \
                 lines `label<tab>sentence`; --quick runs without any of them";
    path.as_deref().ok_or(usage.into())
}
