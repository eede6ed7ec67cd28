//! `lora info`: what an adapter or a model is.

mod adapter;
mod model;
mod norms;
mod picture;

use crate::format::{kind, What};
use crate::report::Report;
use crate::Result;
use std::path::PathBuf;

/// Tells what an adapter or a model is: format, ranks, targets, sizes, and how much each layer changes
#[derive(clap::Args)]
#[command(after_help = "Example: lora info adapter --model Qwen2.5-1.5B-Instruct")]
pub struct Args {
    /// An adapter of any format, or a model: a folder, a GGUF file or a safetensors file
    pub path: PathBuf,
    /// Also whether the adapter fits this model, a folder or a GGUF file
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Draws the norms of an adapter's updates as an SVG file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

pub fn run(args: &Args, report: Report) -> Result<()> {
    match kind(&args.path)? {
        What::Adapter(format) => adapter::tell(args, format, report),
        What::Model if args.model.is_some() || args.svg.is_some() => {
            let at = args.path.display();
            Err(format!("{at}: it is a model: --model and --svg are for adapters").into())
        }
        What::Model => model::tell(&args.path, report),
    }
}
