//! Merges an adapter into its base: `cargo run --release --example merge -- --base model.safetensors
//! --adapter adapter --out merged.safetensors`.
//!
//! The base is a checkpoint, the index of a sharded one, or a folder with either; the adapter a
//! folder in PEFT's format or a file with a loralib state dict.

use candle_core::Device;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use lora::peft::{self, Kind, PeftConfig};
use lora::{LoraConfig, StateDict};
use loralib as lora;
use std::error::Error;
use std::path::PathBuf;

#[derive(Parser)]
#[command(about = "Merges a LoRA adapter into its base model")]
struct Args {
    /// A checkpoint, a `model.safetensors.index.json`, or a folder with either
    #[arg(long)]
    base: PathBuf,
    /// A folder in PEFT's format, or a file with a loralib state dict
    #[arg(long)]
    adapter: PathBuf,
    /// The file to write; for a sharded base a folder
    #[arg(long)]
    out: PathBuf,
    /// The rank, for a state dict whose file does not say it
    #[arg(long)]
    r: Option<usize>,
    /// The strength, for a state dict whose file does not say it
    #[arg(long)]
    lora_alpha: Option<f64>,
    /// The parts of merged linear layers, as `c_attn=1,0,1`
    #[arg(long, value_parser = merged_linear)]
    merged_linear: Vec<(String, Kind)>,
    /// Embeddings, by the end of their names; for a state dict with square ones
    #[arg(long)]
    embedding: Vec<String>,
    /// What the adapter's names begin with and the base's do not, as `transformer.`
    #[arg(long, default_value = "")]
    strip_prefix: String,
}

fn merged_linear(text: &str) -> Result<(String, Kind), String> {
    let (module, parts) = text.split_once('=').ok_or("expected MODULE=1,0,1")?;
    let parts = parts.split(',').map(|part| match part {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(format!("{part:?} is neither 0 nor 1")),
    });
    Ok((module.to_owned(), Kind::MergedLinear(parts.collect::<Result<_, _>>()?)))
}

fn adapter(args: &Args) -> Result<(PeftConfig, StateDict), Box<dyn Error>> {
    if args.adapter.is_dir() {
        return Ok(peft::load_pretrained_as(&args.adapter, &args.merged_linear, &Device::Cpu)?);
    }
    let lora::Checkpoint { tensors, config } = lora::read_state_dict(&args.adapter, &Device::Cpu)?;
    let cfg = match (config, args.r, args.lora_alpha) {
        (Some(cfg), None, None) => cfg,
        (None, Some(r), Some(lora_alpha)) => LoraConfig { r, lora_alpha, ..Default::default() },
        (Some(_), ..) => return Err("the file says its rank and alpha: leave them out".into()),
        (None, ..) => return Err("the file says no rank and alpha: --r and --lora-alpha".into()),
    };
    let config = PeftConfig::from(cfg);
    let config = args.merged_linear.iter().fold(config, |c, (m, kind)| c.with(m, kind.clone()));
    let config = args.embedding.iter().fold(config, |c, m| c.with(m, Kind::Embedding));
    Ok((config, tensors))
}

/// The adapter under the base's names.
fn renamed(
    (mut config, tensors): (PeftConfig, StateDict),
    prefix: &str,
) -> (PeftConfig, StateDict) {
    let strip = |name: String| match name.strip_prefix(prefix) {
        Some(rest) => rest.to_owned(),
        None => name,
    };
    config.layers = config.layers.into_iter().map(|(m, layer)| (strip(m), layer)).collect();
    (config, tensors.into_iter().map(|(name, t)| (strip(name), t)).collect())
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let (config, tensors) = renamed(adapter(&args)?, &args.strip_prefix);
    let bar = ProgressBar::no_length().with_style(ProgressStyle::with_template(
        "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    )?);
    lora::merge_files(&args.base, &tensors, &config, &args.out, |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    })?;
    bar.finish();
    let layers = tensors.keys().filter(|name| name.ends_with("lora_A")).count();
    println!("{layers} layers merged into {}", args.out.display());
    Ok(())
}
