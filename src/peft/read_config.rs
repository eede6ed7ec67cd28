//! Reads the options of `adapter_config.json`. An unknown key with a value is an error, because it might change the
//! update.

use super::entries::Entries;
use super::files::malformed;
use super::patterns::{patterns, Patterns};
use super::tokens::TokenIndices;
use crate::layers::{LayerKind, LoraConfig};
use crate::utils::{AdapterConfig, Bias};
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The contents of the file.
#[derive(Debug)]
pub(crate) struct Json {
    pub config: AdapterConfig,
    pub patterns: Patterns,
    pub lora_bias: bool,
    pub target_parameters: Vec<String>,
    pub(super) token_indices: TokenIndices,
}

/// The keys whose order counts.
#[derive(Deserialize, Default)]
#[serde(default)]
struct InOrder {
    rank_pattern: Option<Entries>,
    alpha_pattern: Option<Entries>,
}

/// Keys that do not change the update: how the adapter was made and trained, and which modules have one,
/// which the tensors tell too.
const HARMLESS_KEYS: [&str; 19] = [
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "velora_config",
];

/// Initialisations that do not change the base.
const HARMLESS_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// Some editors put a byte order mark before the text.
pub(crate) fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

pub(crate) fn object(text: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(without_mark(text)).map_err(malformed)
}

/// The configuration, but for the initialisation.
pub(super) fn read_config(text: &[u8]) -> Result<Json> {
    let map = object(text)?;
    let in_order: InOrder = serde_json::from_slice(without_mark(text)).map_err(malformed)?;
    let (mut config, mut own) = (AdapterConfig::default(), Patterns::default());
    let (mut lora_bias, mut target_parameters) = (false, vec![]);
    let mut token_indices = TokenIndices::default();
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
            "peft_type" => return Err(unsupported(key, value, "only LORA is")),
            "r" => lora.r = rank(value).ok_or_else(wrong)?,
            "lora_alpha" => lora.lora_alpha = value.as_f64().ok_or_else(wrong)?,
            _ if empty => {}
            "lora_dropout" => lora.lora_dropout = dropout(value).ok_or_else(wrong)?,
            "fan_in_fan_out" => lora.fan_in_fan_out = value.as_bool().ok_or_else(wrong)?,
            "use_dora" => lora.use_dora = value.as_bool().ok_or_else(wrong)?,
            "use_rslora" => lora.rslora = value.as_bool().ok_or_else(wrong)?,
            "bias" => config.bias = value.as_str().ok_or_else(wrong)?.parse::<Bias>()?,
            "base_model_name_or_path" => {
                config.base_model_name_or_path = Some(value.as_str().ok_or_else(wrong)?.into());
            }
            "task_type" => config.task_type = Some(value.as_str().ok_or_else(wrong)?.into()),
            "modules_to_save" => config.modules_to_save = strings(value).ok_or_else(wrong)?,
            "rank_pattern" => {
                own.ranks = patterns(key, in_order.rank_pattern.as_ref(), rank)?;
            }
            "alpha_pattern" => {
                own.alphas = patterns(key, in_order.alpha_pattern.as_ref(), Value::as_f64)?;
            }
            "lora_bias" => lora_bias = value.as_bool().ok_or_else(wrong)?,
            "target_parameters" => target_parameters = strings(value).ok_or_else(wrong)?,
            "trainable_token_indices" => {
                token_indices = TokenIndices::read(value).ok_or_else(wrong)?
            }
            key if HARMLESS_KEYS.contains(&key) => {}
            // Until PEFT 0.2, of all layers.
            "enable_lora" => {
                let enabled = value.as_array().ok_or_else(wrong)?.iter().map(Value::as_bool);
                let enabled = enabled.collect::<Option<_>>().ok_or_else(wrong)?;
                config = config.with_layer("", LayerKind::MergedLinear(enabled));
            }
            key => return Err(unsupported(key, value, "this option of PEFT is not known here")),
        }
    }
    Ok(Json { config, patterns: own, lora_bias, target_parameters, token_indices })
}

/// The configuration of an adapter that was saved. An error if its initialisation changed the base.
pub(crate) fn read_saved_config(text: &[u8]) -> Result<Json> {
    match object(text)?.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(how)) if HARMLESS_INITS.contains(&how.as_str()) => {}
        Some(how) => return Err(unsupported("init_lora_weights", how, &changed_base(how))),
    }
    read_config(text)
}

/// Why an initialisation like PiSSA is not read. PEFT converts all but LoftQ.
fn changed_base(init: &Value) -> String {
    let converted = match init == "loftq" {
        true => "",
        false => {
            "save the adapter as a plain LoRA for the unchanged base, by PEFT's `save_pretrained(folder, \
             path_initial_model_for_weight_conversion=...)`; or, "
        }
    };
    format!(
        "the initialisation also changed the base model, and the folder does not tell how: {converted}if your base \
         is the changed one, as `model.unload().save_pretrained(...)` writes it, set init_lora_weights to true"
    )
}

pub(super) fn unsupported(key: &str, value: &Value, reason: &str) -> Error {
    Error::unsupported(format!("the option {key} = {value}"), reason)
}

/// Null, false or empty.
pub(super) fn is_empty(value: &Value) -> bool {
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
    value.as_f64().filter(|p| (0. ..=1.).contains(p)).map(|p| p as f32)
}

pub(super) fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| Some(item.as_str()?.to_owned())).collect()
}
