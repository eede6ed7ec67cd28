//! `lora train`: fine-tunes a language model.

mod adapt;
mod args;
mod batch;
mod columns;
mod curve;
mod data;
mod encode;
mod entries;
mod examples;
mod fit;
mod loss;
mod pairs;
mod peak;
mod prefer;
mod recall;
mod run;
mod sentences;
mod steps;
#[cfg(test)]
mod tests;
mod tiny;

pub use args::Args;
pub use data::{Document, Kind};
pub use run::LABELS;
#[cfg(test)]
pub use {examples::Example, loss::mean_loss};

use crate::chat::{compare, Prompt, Speaker};
use crate::encoder::is_encoder;
use crate::interrupt;
use crate::model::Base;
use crate::report::Report;
use crate::Result;
use std::error::Error;
use std::{env, fmt};

pub fn run(args: &Args, report: Report) -> Result<()> {
    let Args { out, say, seed, resume, overwrite, .. } = args;
    let device = args.device.device(*seed)?;
    interrupt::listen()?;
    let (model, data) = match (&args.model, &args.data) {
        (Some(model), Some(data)) => (model.clone(), data.clone()),
        _ => {
            run::check(out, *resume, *overwrite)?;
            tiny::tiny(args, &device, report)?
        }
    };
    let ready = || -> Result<()> {
        if !data.exists() {
            return Err(format!("{}: no such file: data is not downloaded", data.display()).into());
        }
        run::check(out, *resume, *overwrite)
    };
    if is_encoder(&model) {
        ready()?;
        return match encode::encode(args, &model, &data, &device, report)? {
            true => Ok(()),
            false => Err(stopped().into()),
        };
    }
    let base = Base::read(&model, &device)?;
    ready()?;
    let document = match args.loss {
        Some(loss) => prefer::prefer(args, loss, &base, &data, report)?,
        None => adapt::adapt(args, &base, &data, report)?,
    };
    let Some(document) = document else {
        return match args.data.is_some() {
            true => Err(stopped().into()),
            false => Err("stopped; a run without MODEL begins anew".into()),
        };
    };
    let prompt = match &say.prompt {
        Some(prompt) => {
            let raw = say.raw || document.kind != Kind::Chat;
            Prompt::new(prompt, say.system.as_deref(), &base, raw)?
        }
        None => Prompt::of(&document),
    };
    if prompt.ids(&base)?.is_empty() {
        return Ok(());
    }
    let mut speaker = Speaker::new(&base, &[format!("adapted={}", out.display())])?;
    compare(say, &say.sampler(*seed), &mut speaker, &prompt, report)
}

/// A run that Ctrl-C stopped, with the command that goes on with it.
#[derive(Debug)]
pub struct Stopped(String);

impl Error for Stopped {}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "stopped and saved; go on with: {}", self.0)
    }
}

fn stopped() -> Stopped {
    Stopped(resumed(env::args_os().map(|arg| arg.to_string_lossy().into_owned())))
}

/// The command that goes on with a run.
fn resumed(args: impl Iterator<Item = String>) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:+@%".contains(c);
    let quoted = |arg: String| match !arg.is_empty() && arg.chars().all(plain) {
        true => arg,
        false => format!("'{}'", arg.replace('\'', r"'\''")),
    };
    let kept = args.filter(|arg| arg != "--overwrite" && arg != "--resume").map(quoted);
    kept.chain(["--resume".to_owned()]).collect::<Vec<_>>().join(" ")
}
