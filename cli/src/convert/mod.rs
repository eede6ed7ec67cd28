//! `lora convert`: converts an adapter from one program's format to another's, as by `lora convert --from adapter --to
//! kohya --out lora.safetensors --component unet`.
//!
//! The format of `--from` is detected: this crate's file, PEFT's folder, diffusers', kohya's, MLX's folder, a
//! state dict of torch, or llama.cpp's GGUF. What was written is read again and compared: a conversion that
//! rounds is refused unless `--rounded` allows it.

mod args;
mod base;
mod compare;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use args::Args;

use crate::format::{self, Format};
use crate::report::Report;
use crate::Result;
use base::Bases;
use compare::{compare, Verdict};
use lora::adapter::{AdapterConfig, LoraWeights, Resized};
use loralib as lora;
use serde_json::json;
use std::fs;
use std::path::Path;

pub fn run(args: &Args, report: Report) -> Result<()> {
    if args.out.exists() {
        return Err(format!("{} exists: choose another --out", args.out.display()).into());
    }
    let from = format::detect(&args.from)?;
    let named = |format: Format| matches!(format, Format::Kohya | Format::Gguf);
    if !args.base.is_empty() && !named(from) && !named(args.to) {
        return Err(format!("{from} and {} need no base: leave --base out", args.to).into());
    }
    let bases = Bases::open(&args.base)?;
    let weights = read::read(from, args, &bases, report)?;
    let layers = weights.layers().count();
    let values = json!({ "format": from.to_string(), "layers": layers });
    report.tell(format!("read as {from}: {layers} layers"), "read", values);
    let mut weights = renamed(from, args, weights, report)?;
    if let Some(names) = args.split_experts {
        weights = weights.split_experts(names.into())?;
    }
    if let Some(count) = args.fuse_experts {
        weights = weights.fuse_experts(count as usize)?;
    }
    if let Some(rank) = args.resize {
        weights = resized(&weights, rank as usize, report)?;
    }
    if args.untied_head {
        weights = untied(args.to, &weights)?;
    }
    write::write(args.to, &args.out, &weights, &bases)?;
    let bases = bases.with_names_of(&weights);
    let checked = read::read_again(args.to, &args.out, &weights, &bases).and_then(|again| {
        match compare(&weights, &again)? {
            verdict @ Verdict::Rounded(_) if !args.rounded => {
                Err(format!("not lossless: {verdict}; --rounded allows it").into())
            }
            verdict => Ok((verdict, again)),
        }
    });
    let (verdict, again) = match checked {
        Ok(checked) => checked,
        Err(error) => {
            removed(&args.out)?;
            return Err(error);
        }
    };
    let layers = again.layers().count();
    let line = format!("written as {}: {layers} layers, {verdict}", args.to);
    let values =
        json!({ "format": args.to.to_string(), "layers": layers, "verdict": verdict.to_string() });
    report.tell(line, "written", values);
    let mut lost = left_out(&weights.config(), &again.config());
    if from.is_of_pipelines() == Some(true) && args.from.is_file() {
        let entries = base::metadata(&args.from)?;
        lost.extend(entries.iter().map(|name| format!("the metadata's {name}")));
    }
    for what in lost {
        report.tell(format!("left out: {what}"), "left_out", json!({ "what": what }));
    }
    Ok(())
}

/// Takes the component out of a pipeline's adapter, or makes a pipeline's of a model's.
fn renamed(from: Format, args: &Args, weights: LoraWeights, report: Report) -> Result<LoraWeights> {
    let (to, whole) = (args.to, weights.layers().count());
    let Some(component) = &args.component else {
        let all: Vec<_> = weights.components().collect();
        let has = from.is_of_pipelines().unwrap_or(!all.is_empty());
        return match to.is_of_pipelines() {
            Some(false) if from.is_of_pipelines() == Some(true) => {
                Err(format!("{to} is of one model: give --component, one of {all:?}").into())
            }
            Some(true) if !has => {
                let some = r#"["unet", "transformer", "text_encoder"] and others of diffusers"#;
                Err(format!("{to} is of a pipeline: give --component, one of {some}").into())
            }
            _ => Ok(weights),
        };
    };
    let part = weights.component(component);
    let take = from.is_of_pipelines().unwrap_or(part.is_ok());
    let put = to.is_of_pipelines().unwrap_or(!take);
    if !take && !put {
        return Err(format!("{from} and {to} have no components: leave --component out").into());
    }
    let weights = if take { part? } else { weights };
    let others = whole - weights.layers().count();
    if others > 0 {
        let what = format!("{others} layers of other components than {component}");
        report.tell(format!("left out: {what}"), "left_out", json!({ "what": what }));
    }
    Ok(if put { weights.in_component(component) } else { weights })
}

/// The adapter with another rank; tells how much of the updates is kept.
fn resized(weights: &LoraWeights, rank: usize, report: Report) -> Result<LoraWeights> {
    let Resized { weights, kept } = weights.resized(rank)?;
    let mean = kept.values().sum::<f64>() / kept.len().max(1) as f64;
    if let Some((path, least)) = kept.iter().min_by(|(_, a), (_, b)| a.total_cmp(b)) {
        let line = format!(
            "rank {rank} keeps {:.1} % of an update's squared norm in the mean, least of {path}: {:.1} %",
            mean * 100.,
            least * 100.
        );
        report.tell(line, "resized", json!({ "rank": rank, "kept": kept }));
    }
    Ok(weights)
}

/// For a base whose head is not tied: it follows the embedding in no format, whichever a tied one would.
fn untied(to: Format, weights: &LoraWeights) -> Result<LoraWeights> {
    let mut config = weights.config();
    let follows = to == Format::Mlx;
    if config.ensure_weight_tying == follows {
        return Err(format!(
            "{to} treats a tied head as the adapter does: leave --untied-head out"
        )
        .into());
    }
    config.ensure_weight_tying = follows;
    Ok(LoraWeights::new(config, weights.state_dict())?)
}

/// The options that the new format lacks. They do not change the update.
fn left_out(before: &AdapterConfig, after: &AdapterConfig) -> Vec<String> {
    let options = |config: &AdapterConfig| {
        [
            ("lora_dropout", config.lora.lora_dropout.to_string()),
            ("base_model_name_or_path", config.base_model_name_or_path.clone().unwrap_or_default()),
            ("task_type", config.task_type.clone().unwrap_or_default()),
        ]
    };
    let pairs = options(before).into_iter().zip(options(after));
    let lost = pairs.filter(|(before, after)| before != after);
    lost.map(|((name, value), _)| format!("{name}, which was {value}")).collect()
}

fn removed(out: &Path) -> std::io::Result<()> {
    if out.is_dir() {
        fs::remove_dir_all(out)
    } else {
        fs::remove_file(out)
    }
}
