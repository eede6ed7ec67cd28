//! `lora merge`: merges an adapter into its base, as by `lora merge --base model.safetensors --adapter adapter --out
//! merged.safetensors`.
//!
//! The base is a checkpoint, the index of a sharded one, or a folder with either. The adapter is a folder
//! in PEFT's format or a file with a loralib state dict.

use crate::report::Report;
use crate::Result;
use candle_core::Device;
use lora::layers::LayerKind;
use lora::utils::{Checkpoint, StateDict};
use lora::{adapter::AdapterConfig, formats::peft, merge, LoraConfig, LoraWeights};
use loralib as lora;
use serde_json::json;
use std::path::PathBuf;

/// Merges a LoRA adapter into its base model
#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint, a `model.safetensors.index.json`, or a folder with either
    #[arg(long)]
    base: PathBuf,
    /// A folder in PEFT's format, or a file with a loralib state dict
    #[arg(long)]
    adapter: PathBuf,
    /// The file to write, or a folder for a sharded base
    #[arg(long)]
    out: PathBuf,
    /// The rank, if the state dict has no configuration
    #[arg(long)]
    r: Option<usize>,
    /// The alpha, if the state dict has no configuration
    #[arg(long)]
    lora_alpha: Option<f64>,
    /// Layers with a square weight that are Linear, by the end of their path; "" for all
    #[arg(long, value_name = "MODULE")]
    linear: Vec<String>,
    /// Layers that are an Embedding, by the end of their path
    #[arg(long, value_name = "MODULE")]
    embedding: Vec<String>,
    /// Layers that are a MergedLinear with their enable_lora, as `c_attn=1,0,1`
    #[arg(long, value_name = "MODULE=SPLITS", value_parser = merged_linear)]
    merged_linear: Vec<(String, LayerKind)>,
    /// A prefix of the adapter's names that the base's lack, such as `transformer.`
    #[arg(long, default_value = "")]
    strip_prefix: String,
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
    fn kinds(&self) -> Vec<(String, LayerKind)> {
        let of = |modules: &[String], kind: LayerKind| {
            modules.iter().map(|module| (module.clone(), kind.clone())).collect::<Vec<_>>()
        };
        let (linear, embedding) =
            (of(&self.linear, LayerKind::Linear), of(&self.embedding, LayerKind::Embedding));
        [linear, embedding, self.merged_linear.clone()].concat()
    }
}

pub fn run(args: &Args, report: Report) -> Result<()> {
    let weights = renamed(read(args)?, &args.strip_prefix)?;
    let bar = report.progress("merging", 0).of_bytes();
    let untied = merge::merge_files(&args.base, &weights, &args.out, |progress| {
        bar.bytes(progress.done, progress.total);
    })?;
    bar.finish();
    let layers = weights.layers().count();
    let line = format!("{layers} layers merged into {}", args.out.display());
    report.tell(line, "merged", json!({ "layers": layers, "out": args.out }));
    for head in untied {
        let line = format!("{head} is not tied to the embeddings any more: set tie_word_embeddings to false in config.json");
        report.tell(line, "untied", json!({ "head": head }));
    }
    Ok(())
}

fn read(args: &Args) -> Result<LoraWeights> {
    if args.adapter.is_dir() {
        let weights = peft::load(&args.adapter, &Device::Cpu)?;
        let with_kind = |weights: LoraWeights, (module, kind): (String, LayerKind)| {
            weights.with_kind(&module, kind)
        };
        return Ok(args.kinds().into_iter().try_fold(weights, with_kind)?);
    }
    let Checkpoint { tensors, config } = lora::read_state_dict(&args.adapter, &Device::Cpu)?;
    let config = match (config, args.r, args.lora_alpha) {
        (Some(config), None, None) => config,
        (None, Some(r), Some(lora_alpha)) => {
            LoraConfig { r, lora_alpha, ..Default::default() }.into()
        }
        (Some(_), ..) => {
            return Err("the file has a rank and an alpha: omit --r and --lora-alpha".into())
        }
        (None, ..) => {
            return Err("the file has no rank and alpha: give --r and --lora-alpha".into())
        }
    };
    let with_layer = |config: AdapterConfig, (module, kind)| config.with_layer(module, kind);
    let config = args.kinds().into_iter().fold(config, with_layer);
    let weights = LoraWeights::new(config, tensors);
    Ok(weights.map_err(|e| format!("{}: {e}", args.adapter.display()))?)
}

/// The adapter with the base's names.
fn renamed(weights: LoraWeights, prefix: &str) -> Result<LoraWeights> {
    if prefix.is_empty() {
        return Ok(weights);
    }
    let strip = |name: String| name.strip_prefix(prefix).map(str::to_owned).unwrap_or(name);
    let mut config = weights.config();
    config.layers = config.layers.into_iter().map(|(path, own)| (strip(path), own)).collect();
    let rows = config.trainable_token_indices.into_iter();
    config.trainable_token_indices = rows.map(|(path, own)| (strip(path), own)).collect();
    let tensors: StateDict =
        weights.state_dict().into_iter().map(|(name, tensor)| (strip(name), tensor)).collect();
    Ok(LoraWeights::new(config, tensors)?)
}
