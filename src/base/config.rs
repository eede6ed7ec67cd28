//! A model's `config.json` for a type that knows its older names.

use crate::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{json, Value};
use std::fs;
use std::path::Path;

/// Reads a model's `config.json`, or that of a folder, as the `Config` of a model in candle-transformers or of your own.
///
/// transformers 5 writes the options of the rotary embedding as `rope_parameters`, and the layers with a window as
/// `layer_types`. The types of candle-transformers have the names of older files: `rope_theta`, `rope_scaling`,
/// `rope_local_base_freq`, `partial_rotary_factor`, `sliding_window_pattern`. What the file does not have by these is added
/// from the newer ones.
///
/// ```no_run
/// # #[derive(serde::Deserialize)] struct Config { rope_theta: f64 } // that of `candle_transformers::models::qwen3`
/// let config: Config = loralib::base::read_config("Qwen3-0.6B")?;
/// # let _ = config.rope_theta;
/// # Ok::<(), loralib::Error>(())
/// ```
///
/// # Errors
/// If the file cannot be read, or `T` needs an option that it does not have; and if `T` has no field for an option
/// without which the model would be another one, such as a `rope_scaling`, a window that is used, a softcap, or a bias.
pub fn read_config<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<T> {
    let path = path.as_ref();
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let read = || {
        let json: Value = serde_json::from_slice(&fs::read(&file)?)
            .map_err(|e| Error::Invalid(format!("not a configuration: {e}")))?;
        fitted(with_older_names(json))
    };
    read().map_err(|e: Error| e.at(&file))
}

/// The type of a configuration, if it has fields for all that counts.
pub(crate) fn fitted<T: DeserializeOwned>(json: Value) -> Result<T> {
    let counting = counting(&json);
    let mut dropped = vec![];
    let read = serde_ignored::deserialize(json, |field| {
        dropped.extend(counting.iter().find(|(name, _)| *name == field.to_string()).cloned());
    });
    if let Some((name, value)) = dropped.first() {
        let what = format!("a model with {name} {value}");
        let reason = "the type of the configuration has no such field, and the model would compute without it";
        return Err(Error::unsupported(what, reason));
    }
    read.map_err(|e| Error::Invalid(format!("the configuration does not fit: {e}")))
}

/// The options that change what the model computes, where they are not at the value that changes nothing.
fn counting(json: &Value) -> Vec<(&'static str, Value)> {
    let is_used = |name: &str| {
        let value = &json[name];
        match name {
            _ if value.is_null() => false,
            "attention_bias" | "mlp_bias" => value == true,
            "sliding_window" => {
                json["use_sliding_window"] != false
                    && value.as_u64() < json["max_position_embeddings"].as_u64()
            }
            "rope_scaling" | "attn_logit_softcapping" | "final_logit_softcapping" => true,
            _ => value.as_f64() != Some(1.),
        }
    };
    const NAMES: [&str; 10] = [
        "rope_scaling",
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention_bias",
        "mlp_bias",
        "partial_rotary_factor",
        "logits_scaling",
        "embedding_multiplier",
        "residual_multiplier",
    ];
    NAMES.into_iter().filter(|name| is_used(name)).map(|name| (name, json[name].clone())).collect()
}

/// The configuration with the older names of what it has by newer ones.
fn with_older_names(mut json: Value) -> Value {
    let rope = json["rope_parameters"].clone();
    let (all, windows) = match rope["full_attention"].is_object() {
        true => (rope["full_attention"].clone(), rope["sliding_attention"].clone()),
        false => (rope, Value::Null),
    };
    // candle's Qwen2 needs a window, where none is used: one that has all.
    let unused = match json["model_type"].as_str() {
        Some("qwen2") => json["max_position_embeddings"].clone(),
        _ => Value::Null,
    };
    let scaled = all["rope_type"].as_str().is_some_and(|kind| kind != "default");
    let mut scaling = all.clone();
    if let (true, Some(options)) = (scaled, scaling.as_object_mut()) {
        // Some types have one of the names, some the other.
        options.insert("type".to_owned(), all["rope_type"].clone());
        options.remove("rope_theta");
        options.remove("partial_rotary_factor");
    }
    let older = [
        ("rope_theta", all["rope_theta"].clone()),
        ("partial_rotary_factor", all["partial_rotary_factor"].clone()),
        ("rope_local_base_freq", windows["rope_theta"].clone()),
        ("rope_scaling", if scaled { scaling } else { Value::Null }),
        ("sliding_window_pattern", pattern(&json["layer_types"])),
        ("torch_dtype", json["dtype"].clone()),
        ("sliding_window", unused),
    ];
    if let Some(options) = json.as_object_mut() {
        for (name, value) in older {
            let missing = options.get(name).is_none_or(Value::is_null);
            if missing && !value.is_null() {
                options.insert(name.to_owned(), value);
            }
        }
    }
    json
}

/// Of how many layers the last has no window.
fn pattern(layer_types: &Value) -> Value {
    let types = layer_types.as_array().map_or(&[][..], Vec::as_slice);
    let first = types.iter().position(|kind| kind == "full_attention");
    first.map_or(Value::Null, |first| json!(first + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Config {
        rope_theta: f64,
        rope_local_base_freq: Option<f64>,
        sliding_window: Option<usize>,
        sliding_window_pattern: Option<usize>,
    }

    fn read(json: Value) -> Result<Config> {
        let dir = tempfile::tempdir()?;
        fs::write(dir.path().join("config.json"), json.to_string())?;
        read_config(dir.path())
    }

    fn error(json: Value) -> String {
        read(json).unwrap_err().to_string()
    }

    #[test]
    fn newer_names_are_read_by_the_older_ones() -> Result<()> {
        let config = |rope_theta| Config {
            rope_theta,
            rope_local_base_freq: None,
            sliding_window: None,
            sliding_window_pattern: None,
        };
        assert_eq!(read(json!({ "rope_theta": 3. }))?, config(3.));
        let newer = json!({ "rope_parameters": { "rope_theta": 5., "rope_type": "default" } });
        assert_eq!(read(newer)?, config(5.));
        let both = json!({ "rope_theta": 3., "rope_parameters": { "rope_theta": 5. } });
        assert_eq!(read(both)?, config(3.));
        let gemma = json!({
            "rope_parameters": {
                "full_attention": { "rope_theta": 5., "rope_type": "default" },
                "sliding_attention": { "rope_theta": 2., "rope_type": "default" },
            },
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 8,
            "max_position_embeddings": 64,
        });
        let expected = Config {
            rope_local_base_freq: Some(2.),
            sliding_window: Some(8),
            sliding_window_pattern: Some(3),
            ..config(5.)
        };
        assert_eq!(read(gemma)?, expected);
        Ok(())
    }

    #[test]
    fn an_option_that_the_type_drops_is_an_error_if_it_counts() {
        let rope = json!({ "rope_theta": 5., "rope_type": "linear", "factor": 2. });
        let told = error(json!({ "rope_parameters": rope }));
        assert!(told.contains("config.json") && told.contains("rope_scaling"), "{told}");
        for (name, counts, not) in [
            ("attention_bias", json!(true), json!(false)),
            ("final_logit_softcapping", json!(30.), json!(null)),
            ("partial_rotary_factor", json!(0.5), json!(1.0)),
            ("logits_scaling", json!(8), json!(1)),
        ] {
            let told = error(json!({ "rope_theta": 1., name: counts }));
            assert!(told.contains(name), "{told}");
            assert!(read(json!({ "rope_theta": 1., name: not })).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_bad_file_is_an_error_with_its_name() {
        let told = error(json!({}));
        assert!(told.contains("config.json") && told.contains("rope_theta"), "{told}");
        assert!(error(json!([1])).contains("config.json"));
        let told = read_config::<Value>("no/such/folder").unwrap_err().to_string();
        assert!(told.contains("no/such/folder"), "{told}");
    }
}
