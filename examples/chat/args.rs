//! The flags.

use crate::sample::Sampler;
use clap::{Parser, ValueEnum};
use lora::{InitLoraWeights, LoraConfig, Targets};
use loralib as lora;
use std::path::PathBuf;

/// Fine-tunes a language model (Llama, Mistral, Qwen2 or Qwen3) with LoRA, and talks to it.
///
/// Without --model a tiny Llama is trained first, on embedded text.
#[derive(Parser)]
pub struct Args {
    /// A folder as the Hugging Face hub gives it (config.json, tokenizer.json, model.safetensors or its
    /// shards), or a GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// The model's name for PEFT, such as its repository's on the hub [default: the folder; none for a GGUF file]
    #[arg(long, value_name = "NAME", requires = "data")]
    pub base_model: Option<String>,
    /// What to train on: a .txt file with a text in each line, or JSON Lines with "text", with "prompt" and
    /// "completion", or with "messages"
    #[arg(long, value_name = "FILE", requires = "model")]
    pub data: Option<PathBuf>,
    /// What to measure on, in the same format [default: a twentieth of --data]
    #[arg(long, value_name = "FILE", requires = "data")]
    pub valid: Option<PathBuf>,
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
    /// How the adapter starts, by PEFT's names: true, gaussian, pissa, pissa_niter_[number] or olora
    #[arg(long, value_name = "NAME", default_value = "true")]
    pub init_lora_weights: InitLoraWeights,
    /// The layers to adapt: all-linear, or names such as q_proj,v_proj
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "all-linear")]
    pub targets: Vec<String>,
    /// The learning rate at its peak [default: 2e-4, and 5e-3 for the tiny model]
    #[arg(long, visible_alias = "rate")]
    pub lr: Option<f64>,
    /// How often the adapter is changed, in all: those before --resume count
    #[arg(long, value_name = "N", default_value_t = 200)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Examples per batch
    #[arg(long, value_name = "N", default_value_t = 4)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Batches per step, one after the other: more examples in the same memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub accumulate: u32,
    /// Keeps the activations of one layer at a time, and computes the others again: less memory, more time
    #[arg(long)]
    pub checkpointing: bool,
    /// Gradients of a larger norm are scaled to this one
    #[arg(long, value_name = "NORM", default_value_t = 1.)]
    pub clip: f64,
    /// Writes the state of the run into --out after each N steps
    #[arg(long, value_name = "N", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub save_every: u32,
    /// Measures the validation loss after each N steps, and keeps the adapter if it is the best so far
    #[arg(long, value_name = "N", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub validate_every: u32,
    /// Goes on with the run in --out, with the same options
    #[arg(long, requires = "data")]
    pub resume: bool,
    /// Tokens to which texts are packed, and behind which other examples are cut off
    #[arg(long, value_name = "N", default_value_t = 256)]
    #[arg(value_parser = clap::value_parser!(u32).range(2..))]
    pub length: u32,
    /// Seed of the order of examples, of the new adapter, of its dropout and of what the model says
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    pub device: Place,
    /// The folder for the adapter, in PEFT's format, and for a GGUF file also as adapter.gguf
    #[arg(long, value_name = "FOLDER", default_value = "target/chat")]
    pub out: PathBuf,
    /// Only talks, with this adapter: a folder in PEFT's format. Without --prompt, about the lines of the
    /// standard input, each after those before it
    #[arg(long, value_name = "FOLDER", requires = "model", conflicts_with = "data")]
    pub adapter: Option<PathBuf>,
    /// What to say to the model [default: what the first example to measure on begins with]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// The prompt is a text to continue, not a message, though the model has a chat template
    #[arg(long)]
    pub raw: bool,
    /// How many tokens the model says at most
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub tokens: usize,
    /// Draws tokens by their probabilities, sharpened below 1 and flattened above; at 0 the likeliest is said
    #[arg(long, value_name = "T", default_value_t = 0., value_parser = temperature)]
    pub temperature: f64,
    /// Draws only from the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = probability)]
    pub top_p: f64,
    /// Talks with the adapter beside the frozen weights instead of merged into them, as it always is with a
    /// GGUF file
    #[arg(long)]
    pub unmerged: bool,
    /// A few seconds with a tiny new model: no good sentences
    #[arg(long, conflicts_with_all = ["model", "data", "adapter"])]
    pub quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Place {
    Cpu,
    Cuda,
}

fn temperature(text: &str) -> Result<f64, String> {
    within(text, 0.0..f64::INFINITY, "0 or more")
}

fn probability(text: &str) -> Result<f64, String> {
    within(text, f64::MIN_POSITIVE..1f64.next_up(), "above 0 and at most 1")
}

fn within(text: &str, range: std::ops::Range<f64>, expected: &str) -> Result<f64, String> {
    let value = text.parse().map_err(|e| format!("{e}"))?;
    range.contains(&value).then_some(value).ok_or(format!("expected a number {expected}"))
}

impl Args {
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            r: self.rank as usize,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            // Measured without merging: a copy of each weight would be as large as the model.
            merge_weights: false,
            init_lora_weights: self.init_lora_weights,
            ..Default::default()
        }
    }

    pub fn sampler(&self) -> Sampler {
        Sampler::new(self.temperature, self.top_p, self.seed)
    }

    pub fn targets(&self) -> Targets {
        match &self.targets[..] {
            [all] if all == "all-linear" => Targets::all_linear(),
            names => names.into(),
        }
    }
}
