//! A language model is fine-tuned with LoRA and talked to: Llama, Mistral, Qwen2 or Qwen3.
//!
//! `cargo run --release --example chat -- --model PATH --data FILE` trains an adapter for a model from the
//! Hugging Face hub or a GGUF file, saves it in PEFT's format and lets base and adapted model answer one prompt;
//! `-- --model PATH --adapter FOLDER` only talks, about `--prompt TEXT` or the lines of the standard input. Without
//! flags a tiny Llama is trained first; `-- --help` lists the options.

mod adapt;
mod args;
mod attention;
mod base;
mod batch;
mod config;
mod converse;
mod curve;
mod data;
mod examples;
mod folder;
mod generate;
mod gguf;
mod llama;
mod loss;
mod rope;
mod run;
mod sample;
mod talk;
mod template;
#[cfg(test)]
mod tests;
mod tiny;
mod tokens;
mod train;

#[path = "../common/buckets.rs"]
mod buckets;
#[path = "../common/corpus.rs"]
#[expect(dead_code, reason = "`finetune` also counts the slots of held-out lines")]
mod corpus;
#[path = "../common/lines.rs"]
mod lines;
#[path = "../common/peak.rs"]
mod peak;
#[path = "../common/rng.rs"]
mod rng;

use args::{Args, Place};
use base::Base;
use candle_core::Device;
use clap::Parser;
use converse::converse;
use std::fs;
use std::process::ExitCode;
use talk::{talk, Prompt};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    // The backtrace that candle's errors carry says nothing to whoever mistyped a path.
    std::env::set_var("RUST_LIB_BACKTRACE", "0");
    // As one of rayon's threads: from any other, each parallel loop hands all its work over and waits.
    match rayon::scope(|_| run(&Args::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let device = match args.device {
        Place::Cpu => Device::Cpu,
        Place::Cuda => Device::new_cuda(0)?,
    };
    if !device.is_cpu() {
        device.set_seed(args.seed)?;
    }
    if let (Some(model), Some(adapter)) = (&args.model, &args.adapter) {
        let base = Base::read(model, &device)?;
        return match &args.prompt {
            Some(prompt) => talk(args, &base, &Prompt::new(prompt, &base, args.raw)?, adapter),
            None => converse(args, &base, adapter),
        };
    }
    fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    let (model, data) = match (&args.model, &args.data) {
        (Some(model), Some(data)) => (model.clone(), data.clone()),
        (Some(_), None) => {
            return Err("--model without --data: what to train on? Or --adapter?".into())
        }
        (None, _) => tiny::tiny(args, &device)?,
    };
    let base = Base::read(&model, &device)?;
    let document = adapt::adapt(args, &base, &data)?;
    let prompt = match &args.prompt {
        Some(prompt) => Prompt::new(prompt, &base, args.raw || document.kind != data::Kind::Chat)?,
        None => Prompt::of(&document),
    };
    talk(args, &base, &prompt, &args.out)
}
