//! A model.

use super::adapter::size;
use crate::encoder::{self, is_encoder};
use crate::format::is_gguf;
use crate::model::Base;
use crate::report::Report;
use crate::Result;
use candle_core::Device;
use loralib::gguf::File;
use safetensors::SafeTensors;
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The number of values and of bytes, by dtype.
type Dtypes = BTreeMap<String, [usize; 2]>;

pub fn tell(path: &Path, report: Report) -> Result<()> {
    let gguf = path.is_file() && is_gguf(path)?;
    let dtypes = if gguf { of_gguf(path)? } else { of_safetensors(path)? };
    let sum = |i: usize| dtypes.values().map(|counts| counts[i]).sum::<usize>();
    let (parameters, bytes) = (sum(0), sum(1));
    let shares: Vec<_> = dtypes
        .iter()
        .map(|(dtype, [values, _])| {
            format!("{dtype} {:.0} %", 100. * *values as f64 / parameters.max(1) as f64)
        })
        .collect();
    let mut rows = vec![(
        "weights",
        format!("{parameters} parameters, {}: {}", size(bytes), shares.join(", ")),
    )];
    let mut values = json!({ "parameters": parameters, "bytes": bytes, "dtypes": dtypes });
    // A file of weights alone has no configuration.
    let has_config = path.is_dir() || gguf;
    if is_encoder(path) {
        let base = encoder::Base::read(path, usize::MAX, &Device::Cpu)?;
        rows.insert(0, ("model", base.describe()));
        rows.push(("takes", format!("{} tokens", base.longest())));
        rows.push(("trains", "labels or embeddings".to_owned()));
        values["tokens"] = base.longest().into();
        return told(&rows, values, report);
    }
    match has_config.then(|| Base::read(path, &Device::Cpu)) {
        Some(Ok(base)) => {
            let cfg = &base.config;
            rows.insert(0, ("model", base.describe()));
            rows.push((
                "heads",
                format!("{} of {}, {} of keys", cfg.heads, cfg.head_dim, cfg.kv_heads),
            ));
            rows.push(("takes", format!("{} tokens", cfg.longest)));
            let head = if cfg.tied { "the embeddings" } else { "its own" };
            rows.push(("head", format!("{head}, {} tokens", cfg.vocab_size)));
            let template = if base.template.is_some() { "yes" } else { "no" };
            rows.push(("chats", template.to_owned()));
            values["model_type"] = cfg.model_type.clone().into();
            values["tokens"] = cfg.longest.into();
            values["vocabulary"] = cfg.vocab_size.into();
            values["chat_template"] = base.template.is_some().into();
        }
        Some(Err(error)) => {
            rows.push(("note", format!("`lora train` and `lora chat` do not take it: {error}")));
            values["refused"] = Value::from(error.to_string());
        }
        None => {}
    }
    told(&rows, values, report)
}

fn told(rows: &[(&str, String)], values: Value, report: Report) -> Result<()> {
    let text: String = rows.iter().map(|(name, value)| format!("{name:8} {value}\n")).collect();
    report.tell(text.trim_end(), "model", values);
    Ok(())
}

fn of_gguf(path: &Path) -> Result<Dtypes> {
    let file = File::open(path)?;
    let mut dtypes = Dtypes::new();
    for name in file.tensor_names() {
        let tensor = file.tensor(name, &Device::Cpu)?;
        let values = tensor.shape().elem_count();
        add(&mut dtypes, &format!("{:?}", tensor.dtype()), values, tensor.storage_size_in_bytes());
    }
    Ok(dtypes)
}

fn of_safetensors(path: &Path) -> Result<Dtypes> {
    let at = |file: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
    let mut dtypes = Dtypes::new();
    for file in files(path)? {
        let bytes = fs::read(&file).map_err(|e| at(&file, &e))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| at(&file, &e))?;
        for (_, tensor) in tensors.iter() {
            let values = tensor.shape().iter().product();
            add(&mut dtypes, &format!("{:?}", tensor.dtype()), values, tensor.data().len());
        }
    }
    match dtypes.is_empty() {
        true => Err(at(path, &"it has no safetensors files").into()),
        false => Ok(dtypes),
    }
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = vec![];
    for entry in fs::read_dir(path).map_err(|e| format!("{}: {e}", path.display()))? {
        let file = entry?.path();
        let own =
            !file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("adapter_"));
        if own && file.extension().is_some_and(|end| end == "safetensors") {
            files.push(file);
        }
    }
    Ok(files)
}

fn add(dtypes: &mut Dtypes, dtype: &str, values: usize, bytes: usize) {
    let counts = dtypes.entry(dtype.to_owned()).or_default();
    counts[0] += values;
    counts[1] += bytes;
}
