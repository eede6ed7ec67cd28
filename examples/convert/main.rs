//! Converts an adapter from one program's format to another's: `cargo run --release --example convert -- --from
//! adapter --to kohya --out lora.safetensors --component unet`.
//!
//! The format of `--from` is detected: this crate's file, PEFT's folder, diffusers', kohya's, MLX' folder, a
//! state dict of torch, or llama.cpp's GGUF. What was written is read again and compared: a conversion that
//! rounds is refused unless `--rounded` allows it.

mod args;
mod base;
mod compare;
mod detect;
mod read;
mod write;

use args::{Args, Format};
use base::Bases;
use clap::Parser;
use compare::{compare, Verdict};
use lora::{formats, AdapterConfig, StateDict};
use loralib as lora;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

type Adapter = (AdapterConfig, StateDict);
type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Takes the component out of a pipeline's adapter, or makes a pipeline's of a model's.
fn renamed(from: Format, to: Format, args: &Args, (config, tensors): Adapter) -> Result<Adapter> {
    let Some(component) = &args.component else { return Ok((config, tensors)) };
    let (config, tensors) = match from.is_of_pipelines() {
        true => formats::of_component(component, &config, &tensors)?,
        false => (config, tensors),
    };
    Ok(match to.is_of_pipelines() {
        true => formats::in_component(component, &config, &tensors),
        false => (config, tensors),
    })
}

fn layers(tensors: &StateDict) -> usize {
    tensors.keys().filter(|name| name.ends_with("lora_A")).count()
}

fn removed(out: &Path) -> std::io::Result<()> {
    if out.is_dir() {
        fs::remove_dir_all(out)
    } else {
        fs::remove_file(out)
    }
}

fn convert(args: &Args) -> Result<()> {
    if args.out.exists() {
        return Err(format!("{} exists: choose another --out", args.out.display()).into());
    }
    let from = detect::format(&args.from)?;
    let bases = Bases::open(&args.base)?;
    let adapter = read::read(from, &args.from, args, &bases)?;
    println!("read as {from}: {} layers", layers(&adapter.1));
    let adapter = renamed(from, args.to, args, adapter)?;
    write::write(args.to, &args.out, &adapter, &bases)?;
    let bases = bases.with_names_of(&adapter.1);
    let verdict = read::read_again(args.to, &args.out, &adapter.0, &bases)
        .and_then(|again| Ok((compare(&adapter, &again)?, again)));
    match verdict {
        Ok((verdict, again)) if args.rounded || !matches!(verdict, Verdict::Rounded(_)) => {
            println!("written as {}: {} layers, {verdict}", args.to, layers(&again.1));
            let (before, after) = (adapter.0.lora.lora_dropout, again.0.lora.lora_dropout);
            if before != after {
                println!("the format has no lora_dropout, which was {before}");
            }
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

fn main() -> ExitCode {
    match convert(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
