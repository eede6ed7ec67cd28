//! Writes `adapter_config.json`.

use super::folder::malformed;
use super::parameters;
use super::patterns::ModulePattern;
use crate::weights::{common_rank_alpha, AdapterConfig, Factors, LoraWeights};
use crate::{Error, Result};
use serde_json::{json, Map, Value};

/// The file for an adapter with these options and with `layers` in PEFT's shapes, by path. Its keys are known to every
/// version of PEFT since 0.9, but for options that the adapter needs.
pub(crate) fn config_json(
    config: &AdapterConfig,
    layers: &[(&str, Factors)],
    weights: &LoraWeights,
) -> Result<String> {
    let own = layers.iter().map(|(_, own)| (own.r, own.lora_alpha));
    let (r, alpha) = common_rank_alpha(&config.lora, own).ok_or_else(|| {
        let reason =
            "the adapter has no layers, and PEFT's format needs one: save it in this crate's own";
        Error::Invalid(reason.to_owned())
    })?;
    let pattern = |own: &dyn Fn(&Factors) -> Option<Value>| -> Map<String, Value> {
        let own = layers.iter().filter_map(|(path, factors)| {
            own(factors).map(|value| (pattern_for(path, layers), value))
        });
        own.collect()
    };
    let parameters = parameters::targets(weights);
    let paths = layers.iter().map(|(path, _)| *path);
    let targets: Vec<&str> = paths.filter(|path| !parameters.contains(path)).collect();
    let mut json = json!({
        "alpha_pattern": pattern(&|own| (own.lora_alpha != alpha).then(|| number(own.lora_alpha))),
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": config.bias.to_string(),
        "fan_in_fan_out": config.lora.fan_in_fan_out,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": number(alpha),
        "lora_dropout": shortest(config.lora.lora_dropout),
        "modules_to_save": (!config.modules_to_save.is_empty()).then_some(&config.modules_to_save),
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": pattern(&|own| (own.r != r).then(|| own.r.into())),
        "revision": null,
        "target_modules": targets,
        "task_type": config.task_type,
        "use_dora": config.lora.use_dora,
        "use_rslora": config.lora.rslora,
    });
    if !parameters.is_empty() {
        json["target_parameters"] = parameters.into();
    }
    if weights.layers().any(|(_, layer)| layer.bias.is_some()) {
        json["lora_bias"] = true.into();
    }
    if config.ensure_weight_tying {
        json["ensure_weight_tying"] = true.into();
    }
    if !weights.token_rows.is_empty() {
        json["trainable_token_indices"] = json!(weights.config().trainable_token_indices);
    }
    Ok(serde_json::to_string_pretty(&json).map_err(malformed)? + "\n")
}

/// An integral value as an integer: PEFT's `lora_alpha` is an int.
fn number(value: f64) -> Value {
    if value.fract() == 0. && value.abs() < 1e15 {
        (value as i64).into()
    } else {
        value.into()
    }
}

/// The shortest decimal form: 0.05, not 0.05000000074505806.
pub(crate) fn shortest(value: f32) -> Option<f64> {
    value.to_string().parse().ok()
}

/// A pattern that matches this path alone: the path itself, which every version of PEFT compares
/// literally, or if it matches other layers too, an anchored one, which needs PEFT 0.14.
fn pattern_for(path: &str, layers: &[(&str, Factors)]) -> String {
    let matches_only_path = || {
        let pattern = ModulePattern::new(path)?;
        for (other, _) in layers {
            if pattern.matches(other)? != (*other == path) {
                return Ok(false);
            }
        }
        Ok::<_, String>(true)
    };
    if matches_only_path().unwrap_or(false) {
        path.to_owned()
    } else {
        format!("^{}", fancy_regex::escape(path))
    }
}
