//! A Hugging Face folder's configuration, tokenizer and chat template.

use super::base::Texts;
use super::template::Template;
use super::tokens::{text, Tokens};
use crate::Result;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// An error names the file.
pub fn texts(folder: &Path) -> Result<Texts> {
    let config = read(folder, "config.json", json)?;
    let generation = optional(folder, "generation_config.json", json)?.unwrap_or_default();
    let tokenizer = optional(folder, "tokenizer_config.json", json)?.unwrap_or_default();
    let ends = [&tokenizer["eos_token"], &generation["eos_token_id"], &config["eos_token_id"]];
    let tokens = read(folder, "tokenizer.json", |text| Tokens::new(text, &ends))?;
    // Newer folders have the template in a file of its own.
    let source = optional(folder, "chat_template.jinja", |text| Ok(text.to_owned()))?;
    let source = source.or_else(|| template(&tokenizer["chat_template"]).map(str::to_owned));
    let special = |name: &str| text(&tokenizer[name]).unwrap_or_default().to_owned();
    let template = source.map(|s| Template::new(s, special("bos_token"), special("eos_token")));
    Ok(Texts { config, tokens, template: template.transpose()? })
}

fn json(text: &str) -> Result<Value> {
    Ok(serde_json::from_str(text)?)
}

fn read<T>(folder: &Path, name: &str, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let text = fs::read_to_string(folder.join(name)).map_err(Into::into);
    text.and_then(|text| parse(&text)).map_err(|e| format!("{name}: {e}").into())
}

/// `None` for a file that is not there.
fn optional<T>(
    folder: &Path,
    name: &str,
    parse: impl FnOnce(&str) -> Result<T>,
) -> Result<Option<T>> {
    folder.join(name).exists().then(|| read(folder, name, parse)).transpose()
}

/// A template, or the default one of several.
fn template(value: &Value) -> Option<&str> {
    let Value::Array(list) = value else { return value.as_str() };
    let default = list.iter().find(|template| template["name"] == "default");
    default.or(list.first())?["template"].as_str()
}
