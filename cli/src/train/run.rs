//! A run on disk: its state to resume from, its best adapter, and its curve.

use super::args::Args;
use super::curve::Curve;
use crate::report::Report;
use crate::Result;
use lora::train::AdamW;
use lora::Adapter;
use loralib as lora;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// What to do between the steps.
pub struct Run<'a> {
    /// The folder for the state and the curve.
    pub out: PathBuf,
    pub options: Options,
    pub save_every: usize,
    pub validate_every: usize,
    /// Goes on with the run in the folder.
    pub resume: bool,
    /// It draws the masks of dropout.
    pub adapter: Adapter,
    /// The validation loss, and what else is measured, by its name.
    pub validate: &'a dyn Fn() -> Result<Measured>,
    /// Keeps the adapter as the best so far.
    pub keep: &'a dyn Fn() -> Result<()>,
    pub report: Report,
}

/// A validation loss, and what else a model's outputs say, by name.
pub struct Measured {
    pub loss: f64,
    pub more: Vec<(String, f64)>,
}

/// What a saved run says beside the optimizer's state. The order of the examples follows from the seed.
#[derive(Serialize, Deserialize)]
struct Progress<C> {
    dropout: u64,
    options: Options,
    curve: C,
}

/// What has to be the same when a run goes on, by its flag.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Options {
    pub model: String,
    pub rank: usize,
    pub alpha: f64,
    pub dropout: f32,
    pub init_lora_weights: String,
    pub targets: Vec<String>,
    #[serde(default)]
    pub train_tokens: Vec<String>,
    pub lr: f64,
    pub steps: usize,
    pub batch: usize,
    pub accumulate: usize,
    pub length: usize,
    pub no_packing: bool,
    /// Of preferences, with its options.
    #[serde(default)]
    pub loss: Option<String>,
    /// An encoder's.
    #[serde(default)]
    pub task: Option<String>,
    #[serde(default)]
    pub scale: Option<f64>,
    #[serde(default)]
    pub dims: Vec<u32>,
    pub clip: f64,
    pub seed: u64,
    /// Hashes of all tokens, to train on and to measure on.
    pub data: u64,
    pub valid: u64,
}

impl Options {
    /// As the arguments say, for what they leave open as 0.
    pub fn of(args: &Args, model: String) -> Self {
        Self {
            model,
            rank: args.rank as usize,
            alpha: args.alpha,
            dropout: args.dropout,
            init_lora_weights: format!("{:?}", args.init_lora_weights),
            targets: args.targets.clone(),
            train_tokens: args.train_tokens.clone(),
            lr: 0.,
            steps: 0,
            batch: args.batch as usize,
            accumulate: args.accumulate as usize,
            length: 0,
            no_packing: args.no_packing,
            loss: None,
            task: None,
            scale: None,
            dims: args.dims.clone(),
            clip: args.clip,
            seed: args.seed,
            data: 0,
            valid: 0,
        }
    }

    /// How the options differ from those of the run, each by its flag.
    fn differences(&self, was: &Self) -> Result<Vec<String>> {
        let values = |options: &Self| match serde_json::to_value(options) {
            Ok(Value::Object(values)) => Ok(values),
            other => Err(format!("{other:?}")),
        };
        let (now, was) = (values(self)?, values(was)?);
        let differ = was.into_iter().filter(|(name, was)| now.get(name) != Some(was));
        let differ = differ.map(|(name, was)| match &name[..] {
            "data" => "DATA has other tokens".to_owned(),
            "valid" => "--valid has other tokens".to_owned(),
            "model" => format!("MODEL was {was}"),
            "task" => format!("the task was {was}"),
            name => format!("--{name} was {}", told(&was)),
        });
        Ok(differ.collect())
    }
}

/// An option's value as the command line has it.
fn told(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().map(told).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// The files of a run in `out`.
const STATE: &str = "state.safetensors";
const FILES: [&str; 6] =
    [STATE, "adapter_config.json", "adapter_model.safetensors", "adapter.gguf", LABELS, "loss.svg"];

/// The names of an encoder's labels.
pub const LABELS: &str = "labels.json";

/// An error if `out` has a run, which is neither to be resumed nor replaced, or none that could be resumed, or a model.
pub fn check(out: &Path, resume: bool, overwrite: bool) -> Result<()> {
    let at = out.display();
    if out.is_file() {
        return Err(format!("{at}: it is a file, expected a folder for the adapter").into());
    }
    if ["config.json", "model.safetensors"].iter().any(|name| out.join(name).exists()) {
        return Err(format!("{at}: it is a model's folder: choose another --out").into());
    }
    let found = FILES.iter().find(|name| out.join(name).exists());
    match found {
        Some(name) if !resume && !overwrite => {
            let at = out.join(name);
            let resumed = match out.join(STATE).exists() {
                true => "--resume goes on with the run, ",
                false => "",
            };
            Err(format!("{}: it is there already: {resumed}--overwrite replaces it", at.display())
                .into())
        }
        _ if resume && !out.join(STATE).exists() => Err(format!(
            "{}: no such file: there is no run to go on with",
            out.join(STATE).display()
        )
        .into()),
        _ => Ok(()),
    }
}

/// Makes `out` a folder for a new run, without one before it.
pub fn prepare(out: &Path) -> Result<()> {
    fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    for name in FILES {
        match fs::remove_file(out.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{}: {e}", out.join(name).display()).into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// An error, by their flags, if the options differ from those of the run in `out`.
pub fn check_options(out: &Path, now: &Options) -> Result<()> {
    let file = out.join(STATE);
    let Progress { options: was, .. }: Progress<Curve> = AdamW::read_progress(&file)?;
    let differences = now.differences(&was)?;
    match differences.is_empty() {
        true => Ok(()),
        false => {
            let all = differences.join(", ");
            Err(format!("{}: the run cannot go on with other options: {all}", file.display())
                .into())
        }
    }
}

impl Run<'_> {
    /// The curve so far: of the run that is resumed, or with the loss before the first step.
    pub fn begin(&self, opt: &mut AdamW) -> Result<Curve> {
        if !self.resume {
            let mut curve = Curve::default();
            self.measure(0, &mut curve)?;
            return Ok(curve);
        }
        let Progress { dropout, options, curve } = opt.load(self.out.join(STATE))?;
        self.adapter.set_dropout_position(dropout)?;
        let (done, values) = (opt.steps(), json!({ "step": opt.steps() }));
        let line = match done == options.steps {
            true => format!("the run has all its {done} steps"),
            false => format!("going on after step {done}"),
        };
        self.report.tell(line, "resumed", values);
        Ok(curve)
    }

    /// Measures and saves where it is time to, after the last step, and before a stop.
    pub fn after(&self, opt: &AdamW, stop: bool, curve: &mut Curve) -> Result<()> {
        let (step, last) = (opt.steps(), opt.steps() == self.options.steps);
        let due = |every| step.is_multiple_of(every) || last;
        if due(self.validate_every) {
            let best = curve.best();
            let loss = self.measure(step, curve)?;
            if best.is_none_or(|(_, best)| loss < best) {
                (self.keep)()?;
            }
            curve.draw(&self.out.join("loss.svg"))?;
        }
        if due(self.save_every) || stop {
            let (dropout, options) = (self.adapter.dropout_position(), self.options.clone());
            opt.save(self.out.join(STATE), &Progress { dropout, options, curve })?;
        }
        Ok(())
    }

    fn measure(&self, step: usize, curve: &mut Curve) -> Result<f64> {
        let Measured { loss, more } = (self.validate)()?;
        curve.validation.push((step, loss));
        let mut line = format!("step {step}: validation loss {loss:.4}");
        let mut values = json!({ "step": step, "loss": loss });
        for (name, value) in more {
            line += &format!(", {name} {value:.3}");
            values[name] = value.into();
        }
        self.report.tell(line, "validation", values);
        Ok(loss)
    }
}
