//! A `LoraConfig` as the JSON that travels in a checkpoint's metadata.

use crate::{Error, LoraConfig, Result};
use candle_core::DType;
use serde_json::{json, Map, Value};
use std::str::FromStr;

/// JSON with sorted keys, so that equal configurations give equal bytes.
pub(super) fn to_json(cfg: &LoraConfig) -> String {
    let mut json = json!({
        "r": cfg.r,
        "lora_alpha": cfg.lora_alpha,
        // By its shortest decimal form: 0.05, not the nearest f64 of the nearest f32.
        "lora_dropout": cfg.lora_dropout.to_string().parse::<f64>().unwrap_or_default(),
        "merge_weights": cfg.merge_weights,
        "fan_in_fan_out": cfg.fan_in_fan_out,
        "rslora": cfg.rslora,
    });
    if let Some(dtype) = cfg.lora_dtype {
        json["lora_dtype"] = dtype.as_str().into();
    }
    json.to_string()
}

pub(super) fn from_json(text: &str) -> Result<LoraConfig> {
    let bad = |reason: String| Error::Format { format: "loralib checkpoint", reason };
    let map: Map<String, Value> =
        serde_json::from_str(text).map_err(|e| bad(format!("its configuration: {e}")))?;
    // The scaling must not come from a default.
    if let Some(required) = ["r", "lora_alpha"].iter().find(|key| !map.contains_key(**key)) {
        return Err(bad(format!("its configuration has no {required:?}")));
    }
    let mut cfg = LoraConfig::default();
    for (key, value) in &map {
        let wrong = || bad(format!("its configuration has {key} = {value}"));
        let number = || value.as_f64().ok_or_else(wrong);
        let flag = || value.as_bool().ok_or_else(wrong);
        match key.as_str() {
            "r" => {
                let r = value.as_u64().and_then(|r| r.try_into().ok());
                cfg.r = r.ok_or_else(wrong)?;
            }
            "lora_alpha" => cfg.lora_alpha = number()?,
            "lora_dropout" => cfg.lora_dropout = number()? as f32,
            "merge_weights" => cfg.merge_weights = flag()?,
            "fan_in_fan_out" => cfg.fan_in_fan_out = flag()?,
            "rslora" => cfg.rslora = flag()?,
            "lora_dtype" => {
                let dtype = value.as_str().and_then(|d| DType::from_str(d).ok());
                cfg.lora_dtype = Some(dtype.ok_or_else(wrong)?);
            }
            _ => return Err(wrong()),
        }
    }
    Ok(cfg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_comes_back_as_it_was() -> Result<()> {
        let cfg = LoraConfig {
            r: 4,
            lora_alpha: 32.,
            lora_dropout: 0.05,
            merge_weights: false,
            fan_in_fan_out: true,
            rslora: true,
            lora_dtype: Some(DType::BF16),
        };
        assert_eq!(from_json(&to_json(&cfg))?, cfg);
        assert_eq!(from_json(&to_json(&LoraConfig::default()))?, LoraConfig::default());
        assert_eq!(from_json(r#"{"r": 2, "lora_alpha": 3}"#)?.scaling(), 1.5);
        for bad in ["{}", r#"{"r": 2}"#, r#"{"lora_alpha": 3}"#] {
            assert!(from_json(bad).is_err(), "{bad}");
        }
        for bad in [r#""r": -1"#, r#""unknown": 1"#, r#""rslora": 1"#, r#""lora_dtype": "F3""#] {
            assert!(from_json(&format!(r#"{{"r": 2, "lora_alpha": 3, {bad}}}"#)).is_err(), "{bad}");
        }
        Ok(())
    }
}
