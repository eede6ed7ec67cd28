//! Reading `adapter_config.json`: what is not understood and might change the update is an error.

use super::pattern::Pattern;
use super::{malformed, PeftConfig};
use crate::{Bias, LoraConfig, Result};
use serde_json::{Map, Value};

/// What the file says.
#[derive(Debug)]
pub(super) struct Json {
    pub config: PeftConfig,
    pub ranks: Vec<(Pattern, usize)>,
    pub alphas: Vec<(Pattern, f64)>,
}

/// Keys that tell how the adapter was made, or which of the base's modules have one, which the
/// tensors tell too.
const DATA: [&str; 14] = [
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
];

/// Initial values of A and B that leave the base as it is.
const HARMLESS_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

pub(super) fn read_config(text: &[u8]) -> Result<Json> {
    let map: Map<String, Value> = serde_json::from_slice(text).map_err(malformed)?;
    let mut config = PeftConfig::default();
    let (mut ranks, mut alphas) = (vec![], vec![]);
    for required in ["peft_type", "r", "lora_alpha"] {
        if !map.contains_key(required) {
            return Err(malformed(format!("the configuration has no {required:?}")));
        }
    }
    for (key, value) in &map {
        let wrong = || malformed(format!("{key} = {value}"));
        let empty = is_empty(value);
        let lora: &mut LoraConfig = &mut config.lora;
        match key.as_str() {
            "peft_type" if value == "LORA" => {}
            "peft_type" => return Err(wrong()),
            "r" => lora.r = rank(value).ok_or_else(wrong)?,
            "lora_alpha" => lora.lora_alpha = value.as_f64().ok_or_else(wrong)?,
            _ if empty => {}
            "lora_dropout" => lora.lora_dropout = dropout(value).ok_or_else(wrong)?,
            "fan_in_fan_out" => lora.fan_in_fan_out = value.as_bool().ok_or_else(wrong)?,
            "use_rslora" => lora.rslora = value.as_bool().ok_or_else(wrong)?,
            "bias" => config.bias = value.as_str().ok_or_else(wrong)?.parse::<Bias>()?,
            "base_model_name_or_path" => {
                config.base_model_name_or_path = Some(value.as_str().ok_or_else(wrong)?.into());
            }
            "task_type" => config.task_type = Some(value.as_str().ok_or_else(wrong)?.into()),
            "modules_to_save" => config.modules_to_save = strings(value).ok_or_else(wrong)?,
            "rank_pattern" => ranks = patterns(value, rank).map_err(|e| refused(key, e))?,
            "alpha_pattern" => {
                alphas = patterns(value, Value::as_f64).map_err(|e| refused(key, e))?;
            }
            "init_lora_weights" => match value {
                Value::Bool(_) => {}
                Value::String(how) if HARMLESS_STARTS.contains(&how.as_str()) => {}
                _ => return Err(refused(key, format!("{value} changes the base model"))),
            },
            key if DATA.contains(&key) => {}
            key => return Err(refused(key, format!("its value {value} is not understood"))),
        }
    }
    Ok(Json { config, ranks, alphas })
}

fn refused(key: &str, reason: String) -> crate::Error {
    malformed(format!("{key:?} is not supported: {reason}"))
}

/// Null, false, or without contents.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}

fn rank(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|r| r.try_into().ok()).filter(|r| *r > 0)
}

fn dropout(value: &Value) -> Option<f32> {
    value.as_f64().filter(|p| (0. ..1.).contains(p)).map(|p| p as f32)
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| Some(item.as_str()?.to_owned())).collect()
}

type Patterns<T> = std::result::Result<Vec<(Pattern, T)>, String>;

fn patterns<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Patterns<T> {
    let map = value.as_object().ok_or_else(|| format!("its value is {value}"))?;
    map.iter()
        .map(|(pattern, value)| {
            let read = read(value).ok_or_else(|| format!("{pattern:?} has the value {value}"))?;
            Ok((Pattern::new(pattern)?, read))
        })
        .collect()
}
