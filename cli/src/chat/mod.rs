//! `lora chat`: talks to a model with an adapter.

mod adapted;
mod converse;
mod generate;
mod sample;
mod say;
mod talk;
#[cfg(test)]
mod tests;

pub use sample::Sampler;
pub use say::Say;
pub use talk::{talk, Prompt};

use crate::model::Base;
use crate::place::Place;
use crate::Result;
use std::path::PathBuf;

/// Talks to a language model with an adapter
///
/// Without --prompt, about the lines of the standard input, each after those before it.
#[derive(clap::Args)]
pub struct Args {
    /// A folder as the Hugging Face hub gives it (config.json, tokenizer.json, model.safetensors or its
    /// shards), or a GGUF file
    pub model: PathBuf,
    /// The adapter: a folder in PEFT's format
    #[arg(long, value_name = "FOLDER")]
    pub adapter: PathBuf,
    #[command(flatten)]
    pub say: Say,
    /// Seed of what the model says
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    pub device: Place,
}

pub fn run(args: &Args) -> Result<()> {
    let Args { model, adapter, say, seed, device } = args;
    let base = Base::read(model, &device.device(*seed)?)?;
    let mut sampler = say.sampler(*seed);
    match &say.prompt {
        Some(prompt) => talk(say, &sampler, &base, &Prompt::new(prompt, &base, say.raw)?, adapter),
        None => converse::converse(say, &mut sampler, &base, adapter),
    }
}
