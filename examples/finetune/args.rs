//! The flags.

use clap::{Parser, ValueEnum};
use loralib::{Bias, LoraConfig};
use std::path::PathBuf;

/// Adapts a GPT-2 to data-to-text, as in the LoRA paper: lines of `field : value | ..||sentence`.
///
/// Without flags a small base is trained on embedded text about hotels, then adapted to cafes.
#[derive(Parser)]
pub struct Args {
    /// The base: a safetensors file or a Hugging Face GPT-2 folder, with config.json and
    /// tokenizer.json beside the weights. Without it a small base is trained first
    #[arg(long, value_name = "PATH", conflicts_with = "pretrain")]
    pub base: Option<PathBuf>,
    /// Text to train the small base on, instead of the embedded one
    #[arg(long, value_name = "FILE")]
    pub pretrain: Option<PathBuf>,
    /// Text to train the adapter on, instead of the embedded one
    #[arg(long, value_name = "FILE", requires = "valid")]
    pub train: Option<PathBuf>,
    /// Text to measure on, instead of the embedded one
    #[arg(long, value_name = "FILE", requires = "train")]
    pub valid: Option<PathBuf>,
    /// The adapter's rank; the paper's GPT-2, ten times as wide as the small base, takes 4
    #[arg(long, value_name = "R", default_value_t = 16)]
    pub rank: usize,
    /// The adapter's strength: its update is scaled by alpha / rank
    #[arg(long, default_value_t = 32.)]
    pub alpha: f64,
    /// The probability with which a value of the adapter's input is dropped in training
    #[arg(long, value_name = "P", default_value_t = 0.)]
    pub dropout: f32,
    /// The biases to train with the adapter: none, all or lora_only
    #[arg(long, default_value = "none")]
    pub bias: Bias,
    /// Passes of the adapter's training over its text [default: as many as show 7000 lines]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: Option<u32>,
    /// The adapter's learning rate at its peak [default: 1e-2, and 2e-4 with 768 dimensions or
    /// more, as in the paper]
    #[arg(long)]
    pub lr: Option<f64>,
    /// Lines per step
    #[arg(long, value_name = "N", default_value_t = 8)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Seed of the order of lines and of new weights; dropout on the CPU is not seeded
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    pub device: Place,
    /// The folder for base.safetensors, config.json, tokenizer.json, adapter.safetensors and
    /// report.json
    #[arg(long, value_name = "FOLDER", default_value = "target/finetune")]
    pub out: PathBuf,
    /// Only puts this description (`field : value | ..`) into words, with the base (--base, or the
    /// one in --out) and the adapter in --out
    #[arg(long, value_name = "TEXT")]
    pub generate: Option<String>,
    /// A few seconds instead of a minute: less text, fewer steps, no good sentences
    #[arg(long)]
    pub quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Place {
    Cpu,
    Cuda,
}

impl Args {
    /// The adapter's configuration; evaluation merges.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            r: self.rank,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            fan_in_fan_out: true,
            ..Default::default()
        }
    }
}
