//! What a model's folder has beside its weights.

use crate::Result;
use loralib::gguf::File;
use serde_json::{json, Value};
use std::fs;
use std::path::Path;

const CONFIG: &str = "config.json";

/// Copies all files of a folder but weights and hidden ones, and the folders of the modules that sentence-transformers puts
/// behind a model. config.json says that a head is untied, and what the labels of a new one are (`id2label`).
pub fn copy(base: &Path, out: &Path, untied: bool, labels: Option<Value>) -> Result<()> {
    let changed = untied || labels.is_some();
    for entry in fs::read_dir(base)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if !path.is_file() || name.starts_with('.') || is_weights(name) {
            continue;
        }
        let target = out.join(name);
        let copied = match changed && name == CONFIG {
            true => with_head(&path, untied, labels.as_ref())
                .and_then(|config| Ok(fs::write(&target, config)?)),
            false => fs::copy(&path, &target).map(|_| ()).map_err(Into::into),
        };
        copied.map_err(|e| format!("{}: {e}", target.display()))?;
    }
    for module in modules(base)? {
        let (from, to) = (base.join(&module), out.join(&module));
        let copy = || -> std::io::Result<()> {
            fs::create_dir_all(&to)?;
            for entry in fs::read_dir(&from)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    fs::copy(entry.path(), to.join(entry.file_name()))?;
                }
            }
            Ok(())
        };
        copy().map_err(|e| format!("{}: {e}", from.display()))?;
    }
    Ok(())
}

/// The folders that modules.json names: a name alone, in the folder itself.
fn modules(base: &Path) -> Result<Vec<String>> {
    let path = base.join("modules.json");
    if !path.exists() {
        return Ok(vec![]);
    }
    let json: Value = serde_json::from_str(&fs::read_to_string(&path)?)
        .map_err(|e| format!("{}: {e}", path.display()))?;
    let all = json.as_array().into_iter().flatten().filter_map(|module| module["path"].as_str());
    let inside =
        |name: &&str| Path::new(name).components().count() == 1 && base.join(name).is_dir();
    let plain = |name: &&str| !matches!(*name, "." | ".." | "/");
    Ok(all.filter(inside).filter(plain).map(str::to_owned).collect())
}

/// Files that the merged weights replace, and those of other formats.
fn is_weights(name: &str) -> bool {
    let ends =
        [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json"];
    ends.iter().any(|end| name.ends_with(end))
}

fn with_head(config: &Path, untied: bool, labels: Option<&Value>) -> Result<String> {
    let mut config: Value = serde_json::from_str(&fs::read_to_string(config)?)?;
    if untied {
        config["tie_word_embeddings"] = false.into();
    }
    if let Some(Value::Object(labels)) = labels {
        let numbers = labels.iter().filter_map(|(id, label)| {
            Some((label.as_str()?.to_owned(), id.parse::<u64>().ok()?.into()))
        });
        config["label2id"] = Value::Object(numbers.collect());
        config["id2label"] = Value::Object(labels.clone());
    }
    Ok(format!("{config:#}\n"))
}

/// Writes what a GGUF file has beside its weights, with `config` as config.json.
pub fn write(base: &File, config: Value, out: &Path) -> Result<()> {
    let tokenizer = base.tokenizer_json()?;
    let inner: tokenizers::Tokenizer = tokenizer.parse()?;
    let special = |key: &str| {
        let id = config[key].as_u64().and_then(|id| u32::try_from(id).ok());
        id.and_then(|id| inner.id_to_token(id))
    };
    let tokens = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special("bos_token_id"),
        "eos_token": special("eos_token_id"),
        "pad_token": special("pad_token_id"),
        "model_max_length": config["max_position_embeddings"],
    });
    // The token that ends a turn may be another than the one that ends a text.
    let turn = base.metadata().get("tokenizer.ggml.eot_token_id").and_then(|id| id.to_u32().ok());
    let ends = [config["eos_token_id"].clone(), turn.into()];
    let mut ends: Vec<_> = ends.into_iter().filter(|id| !id.is_null()).collect();
    ends.dedup();
    let generation = json!({ "bos_token_id": config["bos_token_id"], "eos_token_id": ends });
    let mut files = vec![
        (CONFIG, format!("{config:#}\n")),
        ("generation_config.json", format!("{generation:#}\n")),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", format!("{tokens:#}\n")),
    ];
    files.extend(base.chat_template().map(|template| ("chat_template.jinja", template.to_owned())));
    for (name, text) in files {
        let path = out.join(name);
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}
