//! `lora convert`: converts an adapter from one program's format to another's, as by `lora convert --from adapter --to
//! kohya --out lora.safetensors --component unet`.
//!
//! The format of `--from` is detected: this crate's file, PEFT's folder, diffusers', kohya's, MLX's folder, a
//! state dict of torch, or llama.cpp's GGUF. What was written is read again and compared: a conversion that
//! rounds is refused unless `--rounded` allows it.

mod args;
mod base;
mod compare;
mod detect;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use args::Args;

use crate::Result;
use args::Format;
use base::Bases;
use compare::{compare, Verdict};
use lora::{formats, AdapterConfig, StateDict};
use loralib as lora;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

type Adapter = (AdapterConfig, StateDict);

pub fn run(args: &Args) -> Result<()> {
    if args.out.exists() {
        return Err(format!("{} exists: choose another --out", args.out.display()).into());
    }
    let from = detect::format(&args.from)?;
    let named = |format: Format| matches!(format, Format::Kohya | Format::Gguf);
    if !args.base.is_empty() && !named(from) && !named(args.to) {
        return Err(format!("{from} and {} need no base: leave --base out", args.to).into());
    }
    let bases = Bases::open(&args.base)?;
    let adapter = read::read(from, &args.from, args, &bases)?;
    println!("read as {from}: {} layers", layers(&adapter.1));
    if layers(&adapter.1) == 0 {
        let first = adapter.1.keys().next().map_or("nothing", String::as_str);
        let reason = "it has no lora_A, but";
        let folder = "; give PEFT's file by its folder";
        return Err(format!("{}: {reason} {first}{folder}", args.from.display()).into());
    }
    let adapter = renamed(from, args.to, args, adapter)?;
    write::write(args.to, &args.out, &adapter, &bases)?;
    let bases = bases.with_names_of(&adapter.1);
    let verdict = read::read_again(args.to, &args.out, &adapter.0, &bases)
        .and_then(|again| Ok((compare(&adapter, &again)?, again)));
    match verdict {
        Ok((verdict, again)) if args.rounded || !matches!(verdict, Verdict::Rounded(_)) => {
            println!("written as {}: {} layers, {verdict}", args.to, layers(&again.1));
            let mut lost = left_out(&adapter.0, &again.0);
            if from.is_of_pipelines() == Some(true) && args.from.is_file() {
                let entries = base::metadata(&args.from)?;
                lost.extend(entries.iter().map(|name| format!("the metadata's {name}")));
            }
            lost.iter().for_each(|what| println!("left out: {what}"));
            Ok(())
        }
        Ok((verdict, _)) => {
            removed(&args.out)?;
            Err(format!("not lossless: {verdict}; --rounded allows it").into())
        }
        Err(error) => {
            removed(&args.out)?;
            Err(error)
        }
    }
}

/// Takes the component out of a pipeline's adapter, or makes a pipeline's of a model's.
fn renamed(from: Format, to: Format, args: &Args, adapter: Adapter) -> Result<Adapter> {
    let (mut config, mut tensors) = adapter;
    let all = components(&tensors);
    let Some(component) = &args.component else {
        return match (from.is_of_pipelines(), to.is_of_pipelines()) {
            (Some(true), Some(false)) => {
                Err(format!("{to} is of one model: give --component, one of {all:?}").into())
            }
            (Some(false), Some(true)) => {
                Err(format!("{to} is of a pipeline: give --component, such as `unet`").into())
            }
            (None, Some(true)) if !all.iter().all(|first| formats::COMPONENTS.contains(first)) => {
                let all = formats::COMPONENTS;
                Err(format!("{to} is of a pipeline: give --component, one of {all:?}").into())
            }
            _ => Ok((config, tensors)),
        };
    };
    let take = from.is_of_pipelines().unwrap_or(all.contains(component.as_str()));
    let put = to.is_of_pipelines().unwrap_or(!take);
    if !take && !put {
        return Err(format!("{from} and {to} have no components: leave --component out").into());
    }
    if take {
        let whole = layers(&tensors);
        (config, tensors) = formats::of_component(component, &config, &tensors)?;
        let others = whole - layers(&tensors);
        if others > 0 {
            println!("left out: {others} layers of other components than {component}");
        }
    }
    if put {
        (config, tensors) = formats::in_component(component, &config, &tensors);
    }
    Ok((config, tensors))
}

fn components(tensors: &StateDict) -> BTreeSet<&str> {
    tensors.keys().filter_map(|name| name.split('.').next()).collect()
}

fn layers(tensors: &StateDict) -> usize {
    tensors.keys().filter(|name| name.ends_with("lora_A")).count()
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
