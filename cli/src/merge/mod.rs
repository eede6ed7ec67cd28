//! `lora merge`: merges an adapter into its base, as by `lora merge --base MODEL --adapter adapter --out merged`.

mod args;
mod folder;
mod read;

pub use args::Args;

use crate::format::is_gguf;
use crate::report::{Progress, Report};
use crate::train::LABELS;
use crate::Result;
use args::Stored;
use loralib::gguf::{self, File, MergeOptions};
use loralib::{merge, LoraWeights};
use read::read;
use serde_json::{json, Value};
use std::fs;
use std::path::{Path, PathBuf};

pub fn run(args: &Args, report: Report) -> Result<()> {
    let Args { base, out, .. } = args;
    let new = !out.exists();
    let filled = out.is_dir() && !files(out)?.is_empty();
    if out.exists() && (filled || !out.is_dir()) {
        return Err(format!("{} exists: choose another --out", out.display()).into());
    }
    let file = match base.is_file() && is_gguf(base)? {
        true => Some(File::open(base)?),
        false => None,
    };
    if file.is_none() && (args.dtype.is_some() || args.force) {
        let reason = "--dtype and --force are for a GGUF base: other weights keep their dtype";
        return Err(reason.into());
    }
    if file.is_none() && out.extension().is_some_and(|end| end == "gguf") {
        let reason = "only a GGUF base becomes a GGUF file: give a folder, or a .safetensors file";
        return Err(format!("{}: {reason}", out.display()).into());
    }
    let weights = read(args, file.as_ref())?;
    let bar = report.progress("merging", 0).of_bytes();
    let merged = match &file {
        Some(file) => of_gguf(args, file, &weights, &bar, report),
        None => of_checkpoint(args, &weights, &bar, report),
    };
    bar.finish();
    if let Err(error) = merged {
        // What is half written is no model.
        if new && out.is_dir() {
            fs::remove_dir_all(out)?;
        } else if out.is_dir() {
            files(out)?.into_iter().try_for_each(fs::remove_file)?;
        }
        return Err(error);
    }
    let layers = weights.layers().count();
    let line = format!("{layers} layers merged into {}", out.display());
    report.tell(line, "merged", json!({ "layers": layers, "out": out.display().to_string() }));
    Ok(())
}

/// What is in a folder, but for hidden files, such as those of a merge that was killed.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let paths = paths.collect::<Result<Vec<_>>>()?;
    let hidden =
        |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    Ok(paths.into_iter().filter(|path| !hidden(path)).collect())
}

fn is_file(out: &Path) -> bool {
    out.extension().is_some_and(|end| end == "gguf" || end == "safetensors")
}

/// Into another GGUF file, or a folder in half precision.
fn of_gguf(
    args: &Args,
    base: &File,
    weights: &LoraWeights,
    bar: &Progress,
    report: Report,
) -> Result<()> {
    let out = &args.out;
    if out.extension().is_some_and(|end| end == "gguf") {
        let dtype = args.dtype.unwrap_or(Stored::Q8_0).in_gguf();
        let options = MergeOptions { dtype, force: args.force };
        let kept = gguf::merge(base, weights, out, options, |p| bar.bytes(p.done, p.total))?;
        if let Some((name, share)) = kept.iter().min_by(|(_, a), (_, b)| a.total_cmp(b)) {
            let line = format!(
                "{:.0} % of the update of {name} is left after rounding, of others more",
                share * 100.
            );
            report.tell(line, "rounded", json!({ "kept": kept }));
        }
        return Ok(());
    }
    if is_file(out) {
        return Err(
            format!("{}: a GGUF base becomes a .gguf file or a folder", out.display()).into()
        );
    }
    let dtype = args.dtype.unwrap_or(Stored::Bf16);
    let dtype = dtype.dense().ok_or("a folder has no q8_0: choose --dtype bf16, f16 or f32")?;
    fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let file = out.join("model.safetensors");
    let progress = |p: merge::MergeProgress| bar.bytes(p.done, p.total);
    let mut config = gguf::merge_to_safetensors(base, weights, file, dtype, progress)?;
    config["dtype"] = match dtype {
        candle_core::DType::BF16 => "bfloat16",
        candle_core::DType::F16 => "float16",
        _ => "float32",
    }
    .into();
    folder::write(base, config, out)
}

/// Into a folder, or a file.
fn of_checkpoint(args: &Args, weights: &LoraWeights, bar: &Progress, report: Report) -> Result<()> {
    let Args { base, out, .. } = args;
    let to_folder = !is_file(out);
    if to_folder {
        fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    }
    let new = merge::merge_files(base, weights, out, |p| bar.bytes(p.done, p.total))?;
    let has_config = to_folder && base.is_dir();
    if has_config {
        folder::copy(base, out, !new.untied.is_empty(), labels(args)?)?;
    }
    if !new.untied.is_empty() {
        let told = match has_config {
            true => "config.json says so",
            false => "set tie_word_embeddings to false in config.json",
        };
        let heads = new.untied.join(", ");
        let line = format!("{heads} is not tied to the embeddings any more: {told}");
        report.tell(line, "untied", json!({ "heads": new.untied }));
    }
    if !new.added.is_empty() {
        let line = format!("the base has no {}: added", new.added.join(", "));
        report.tell(line, "added", json!({ "tensors": new.added }));
    }
    Ok(())
}

/// The names of a head's labels, if the adapter has them.
fn labels(args: &Args) -> Result<Option<Value>> {
    let path = args.adapter.join(LABELS);
    if !path.exists() {
        return Ok(None);
    }
    let json = fs::read_to_string(&path)?;
    let json: Value =
        serde_json::from_str(&json).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Some(json["id2label"].clone()))
}
