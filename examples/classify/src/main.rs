//! A pretrained BERT or RoBERTa learns to tell kinds of sentences apart: LoRA beside a head on the
//! frozen encoder and full fine-tuning, all three by the same model code.
//!
//! `cargo run --release -p classify -- --model FOLDER --train FILE --valid FILE`, with a
//! folder as the Hugging Face hub gives it and lines of `label<tab>sentence`; `-- --quick` needs
//! neither, `-- --help` lists what else there is.

mod args;
mod base;
mod bert;
mod classifier;
mod config;
mod data;
mod evaluate;
mod fit;
mod names;
mod quick;
mod report;
mod reuse;
mod task;

#[path = "../../common/rng.rs"]
#[expect(dead_code, reason = "the embedded text of `finetune` is shuffled too")]
mod rng;
#[path = "../../common/train.rs"]
mod train;

use args::{Args, Place};
use base::Base;
use candle_core::Device;
use clap::Parser;
use report::Report;
use std::fs;
use std::process::ExitCode;
use task::Task;

/// Training allots and frees many tensors of the same sizes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

fn main() -> ExitCode {
    // The backtrace that candle's errors carry says nothing to whoever mistyped a path.
    std::env::set_var("RUST_LIB_BACKTRACE", "0");
    // As one of rayon's threads: from any other, each parallel loop hands all its work over and waits.
    match rayon::scope(|_| run(Args::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut args: Args) -> Result<()> {
    let device = match args.device {
        Place::Cpu => Device::Cpu,
        Place::Cuda => Device::new_cuda(0)?,
    };
    if !device.is_cpu() {
        device.set_seed(args.seed)?;
    }
    fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    if args.quick {
        quick::write(&mut args)?;
    }
    match &args.predict {
        Some(sentence) => reuse::predict(&args, sentence, &device),
        None if args.evaluate => reuse::evaluate(&args, &device),
        None => classify(&args, &device),
    }
}

/// Trains and measures what `--method` says.
fn classify(args: &Args, device: &Device) -> Result<()> {
    let base = Base::read(args.model()?, args.max_length as usize, args.seed, device)?;
    let (train, valid) = (data::read(args.train()?)?, data::read(args.valid()?)?);
    let labels = data::labels(&train);
    let [train, valid] = [train, valid].map(|lines| data::encode(&lines, &labels, &base));
    let (train, valid) = (train?, valid?);
    let mut rows = vec![];
    for &method in args.method.methods() {
        let task = Task {
            method,
            labels: labels.clone(),
            pooling: args.pooling,
            targets: args.targets.clone(),
            bias: args.bias,
            max_length: args.max_length as usize,
        };
        rows.push(fit::fit(args, &base, &task, (&train, &valid), device)?);
    }
    let report = Report(rows);
    println!("\n{report}");
    let path = args.out.join("report.json");
    fs::write(&path, format!("{:#}\n", report.json()))?;
    println!("written to {}", args.out.display());
    Ok(())
}
