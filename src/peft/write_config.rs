//! Writing `adapter_config.json`.

use super::common::common_or_most;
use super::pattern::Pattern;
use super::{malformed, PeftConfig};
use crate::Result;
use serde_json::{json, Map, Value};

/// The file for layers of the given ranks and alphas, by path. Its keys are known to every version
/// of PEFT since 0.9.
pub(super) fn write_config(config: &PeftConfig, layers: &[(&str, usize, f64)]) -> Result<String> {
    let common = (config.lora.r, config.lora.lora_alpha);
    let (r, alpha) = common_or_most(common, layers.iter().map(|&(_, r, alpha)| (r, alpha)))
        .ok_or_else(|| malformed("an adapter without layers"))?;
    let own = |differs: &dyn Fn(usize, f64) -> Option<Value>| -> Result<Map<String, Value>> {
        let mut map = Map::new();
        for &(path, r, alpha) in layers {
            if let Some(value) = differs(r, alpha) {
                map.insert(pattern_for(path, layers)?, value);
            }
        }
        Ok(map)
    };
    let targets: Vec<&str> = layers.iter().map(|(path, ..)| *path).collect();
    let json = json!({
        "alpha_pattern": own(&|_, own| (own != alpha).then(|| number(own)))?,
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": config.bias.to_string(),
        "fan_in_fan_out": config.lora.fan_in_fan_out,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": number(alpha),
        // By its shortest decimal form: 0.05, not the nearest f64 of the nearest f32.
        "lora_dropout": config.lora.lora_dropout.to_string().parse::<f64>().unwrap_or_default(),
        "modules_to_save": (!config.modules_to_save.is_empty()).then_some(&config.modules_to_save),
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": own(&|own, _| (own != r).then(|| own.into()))?,
        "revision": null,
        "target_modules": targets,
        "task_type": config.task_type,
        "use_dora": false,
        "use_rslora": config.lora.rslora,
    });
    Ok(serde_json::to_string_pretty(&json).map_err(malformed)? + "\n")
}

/// A whole number as such: PEFT's `lora_alpha` is an int.
fn number(value: f64) -> Value {
    match value.fract() == 0. && value.abs() < 1e15 {
        true => (value as i64).into(),
        false => value.into(),
    }
}

/// A pattern that is this path alone. All versions of PEFT compare a path as it is; an anchored
/// one only those since 0.14.
fn pattern_for(path: &str, layers: &[(&str, usize, f64)]) -> Result<String> {
    let only = |pattern: &str| -> Result<bool> {
        let pattern = Pattern::new(pattern).map_err(malformed)?;
        Ok(layers.iter().all(|(other, ..)| pattern.matches(other) == (*other == path)))
    };
    match only(path)? {
        true => Ok(path.to_owned()),
        false => Ok(format!("^{}", path.replace('.', r"\."))),
    }
}
