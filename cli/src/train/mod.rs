//! `lora train`: fine-tunes a language model.

mod adapt;
mod args;
mod batch;
mod curve;
mod data;
mod examples;
mod lines;
mod loss;
mod peak;
mod run;
mod steps;
#[cfg(test)]
mod tests;
mod tiny;

pub use args::Args;
pub use data::{Document, Kind};

use crate::chat::{talk, Prompt};
use crate::model::Base;
use crate::Result;
use std::fs;

pub fn run(args: &Args) -> Result<()> {
    let Args { out, say, seed, .. } = args;
    let device = args.device.device(*seed)?;
    fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let (model, data) = match (&args.model, &args.data) {
        (Some(model), Some(data)) => (model.clone(), data.clone()),
        _ => tiny::tiny(args, &device)?,
    };
    let base = Base::read(&model, &device)?;
    let document = adapt::adapt(args, &base, &data)?;
    let prompt = match &say.prompt {
        Some(prompt) => Prompt::new(prompt, &base, say.raw || document.kind != Kind::Chat)?,
        None => Prompt::of(&document),
    };
    talk(say, &say.sampler(*seed), &base, &prompt, out)
}
