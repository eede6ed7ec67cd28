//! Reads `adapter_config.json` for a new adapter: its options, and the layers that tensors do not tell yet.

use super::files::malformed;
use super::patterns::Patterns;
use super::read_config::{is_empty, object, read_config, strings, unsupported, Json};
use super::tokens;
use crate::layers::InitLoraWeights;
use crate::utils::AdapterConfig;
use crate::Result;
use serde_json::{Map, Value};
use std::fs;
use std::path::Path;

/// The options of an adapter that has no tensors yet.
#[derive(Debug)]
pub(crate) struct Fresh {
    pub config: AdapterConfig,
    pub patterns: Patterns,
    pub targets: Modules,
    pub exclude: Modules,
    /// `layers_to_transform`; empty for all.
    pub layers: Vec<usize>,
    pub layers_pattern: Vec<String>,
}

/// Modules by name, or by a regular expression.
#[derive(Debug)]
pub(crate) enum Modules {
    Names(Vec<String>),
    Expression(String),
}

/// Reads the configuration's file.
pub(crate) fn read_fresh(file: &Path) -> Result<Fresh> {
    let text = fs::read(file)?;
    let (map, Json { mut config, patterns, .. }) = (&object(&text)?, read_config(&text)?);
    check_trained(map)?;
    config.lora.init_lora_weights = initialisation(map)?;
    let targets = given(map, "target_modules", modules)?.ok_or_else(|| {
        let null = map.get("target_modules").unwrap_or(&Value::Null);
        unsupported(
            "target_modules",
            null,
            "PEFT then selects by the model's type: name the targets",
        )
    })?;
    if matches!(targets, Modules::Expression(_)) {
        refuse_layers(map, "with a string as target_modules PEFT refuses it: use a list")?;
    }
    let layers = given(map, "layers_to_transform", indices)?.unwrap_or_default();
    let layers_pattern = given(map, "layers_pattern", names)?.unwrap_or_default();
    if layers.is_empty() {
        refuse_layers(map, "it needs layers_to_transform")?;
    }
    let exclude = given(map, "exclude_modules", modules)?.unwrap_or(Modules::Names(vec![]));
    Ok(Fresh { config, patterns, targets, exclude, layers, layers_pattern })
}

/// An error for options that count in training alone, or that are only read and merged.
fn check_trained(map: &Map<String, Value>) -> Result<()> {
    let merged = "it is read and merged, but not trained";
    let refused = [
        ("ensure_weight_tying", "each layer has an adapter of its own"),
        ("lora_bias", merged),
        ("target_parameters", merged),
        ("trainable_token_indices", merged),
        ("velora_config", "gradients are not compressed"),
    ];
    for (key, reason) in refused {
        if let Some(value) = map.get(key).filter(|value| !is_empty(value)) {
            return Err(unsupported(key, value, reason));
        }
    }
    match map.get("lora_dropout") {
        Some(all) if all.as_f64() == Some(1.) => {
            Err(unsupported("lora_dropout", all, "nothing would be left to train"))
        }
        _ => Ok(()),
    }
}

fn initialisation(map: &Map<String, Value>) -> Result<InitLoraWeights> {
    match map.get("init_lora_weights") {
        None => Ok(InitLoraWeights::Uniform),
        Some(Value::String(name)) => name.parse(),
        Some(other) => other.to_string().parse(),
    }
}

/// An error if the configuration selects transformer layers.
fn refuse_layers(map: &Map<String, Value>, reason: &str) -> Result<()> {
    let selected = |key: &&str| map.get(*key).is_some_and(|value| !is_empty(value));
    match ["layers_to_transform", "layers_pattern"].into_iter().find(selected) {
        None => Ok(()),
        Some(key) => Err(unsupported(key, &map[key], reason)),
    }
}

/// The value of a key, or `None` if it is null or empty.
fn given<T>(
    map: &Map<String, Value>,
    key: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>> {
    let value = map.get(key).filter(|value| !is_empty(value));
    let read = |value| read(value).ok_or_else(|| malformed(format!("{key} = {value}")));
    value.map(read).transpose()
}

fn modules(value: &Value) -> Option<Modules> {
    match value {
        Value::String(text) => Some(Modules::Expression(text.clone())),
        value => strings(value).map(Modules::Names),
    }
}

/// One name, or several.
fn names(value: &Value) -> Option<Vec<String>> {
    value.as_str().map(|name| vec![name.to_owned()]).or_else(|| strings(value))
}

/// One index, or several.
fn indices(value: &Value) -> Option<Vec<usize>> {
    let index = |value: &Value| value.as_u64()?.try_into().ok();
    tokens::list(value).or_else(|| Some(vec![index(value)?]))
}
