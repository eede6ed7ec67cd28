//! The life of an adapter, on the LoRA paper's own case: a GPT-2 learns to put data into words; its
//! adapter is trained, saved, loaded, merged and measured.
//!
//! `cargo run --release --example finetune` trains a small base on embedded text about hotels first,
//! then adapts it to cafes, and counts the values of new descriptions that the sentences say before and
//! after; `-- --help` lists the options. Its files go to `target/finetune`, unless `--out` names another
//! folder.

mod adapt;
mod args;
mod base;
mod compare;
mod data;
mod describe;
mod evaluate;
mod generate;
mod gpt2;
mod pretrain;
mod report;
mod slots;
mod text;
mod tokenizer;

#[path = "../common/buckets.rs"]
mod buckets;
#[path = "../common/corpus.rs"]
mod corpus;
#[path = "../common/lines.rs"]
mod lines;
#[path = "../common/rng.rs"]
mod rng;
#[path = "../common/train.rs"]
mod train;

use args::{Args, Place};
use base::Base;
use candle_core::Device;
use clap::Parser;
use std::fs;
use std::process::ExitCode;

/// Training allots and frees many tensors of the same sizes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    match &args.generate {
        Some(description) => generate::say(args, description, &device),
        None => finetune(args, &device),
    }
}

fn finetune(args: &Args, device: &Device) -> Result<()> {
    let text = text::Text::read(args)?;
    fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    let base = match &args.base {
        Some(path) => Base::read(path, args.seed, device)?,
        None => pretrain::pretrain(args, &text, device)?,
    };
    let examples = data::encode(&text.train, &base.tokenizer, base.config.n_positions)?;
    let adapter = adapt::adapt(args, &base, &examples, device)?;
    let report = compare::compare(args, &base, adapter, &text.valid, device)?;
    println!("{report}");
    let path = args.out.join("report.json");
    fs::write(&path, format!("{:#}\n", report.json()))?;
    println!("written to {}", args.out.display());
    Ok(())
}
