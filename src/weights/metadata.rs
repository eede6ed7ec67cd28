//! An [`AdapterConfig`] as the JSON in a checkpoint's metadata.

use super::bias::Bias;
use super::config::{AdapterConfig, LayerConfig};
use crate::layers::{InitLoraWeights, LoraConfig};
use crate::{Error, Result};
use candle_core::DType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::str::FromStr;

/// The fields with loralib's names. `r` and `lora_alpha` are required: no default may decide the scaling.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f32,
    #[serde(default = "yes")]
    merge_weights: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    rslora: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    use_dora: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lora_dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bias: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    modules_to_save: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    trainable_token_indices: BTreeMap<String, Vec<usize>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    ensure_weight_tying: bool,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    layers: BTreeMap<String, LayerConfig>,
}

fn yes() -> bool {
    true
}

/// Equal configurations give equal text.
pub(super) fn to_json(config: &AdapterConfig) -> Result<String> {
    let AdapterConfig {
        lora,
        bias,
        modules_to_save,
        trainable_token_indices,
        ensure_weight_tying,
        layers,
        one_rank: _,
        base_model_name_or_path: _,
        task_type: _,
    } = config;
    // Each by name, so that no new option is left out.
    let LoraConfig {
        r,
        lora_alpha,
        lora_dropout,
        merge_weights,
        fan_in_fan_out,
        rslora,
        use_dora,
        lora_bias: _, // its tensors tell it
        conv_kernels: _,
        init_lora_weights: _,
        lora_dtype,
    } = *lora;
    let json = Json {
        r,
        lora_alpha,
        lora_dropout,
        merge_weights,
        fan_in_fan_out,
        rslora,
        use_dora,
        lora_dtype: lora_dtype.map(|dtype| dtype.as_str().to_owned()),
        bias: (*bias != Bias::None).then(|| bias.to_string()),
        modules_to_save: modules_to_save.clone(),
        trainable_token_indices: trainable_token_indices.clone(),
        ensure_weight_tying: *ensure_weight_tying,
        layers: layers.clone(),
    };
    serde_json::to_string(&json).map_err(malformed)
}

pub(super) fn from_json(text: &str) -> Result<AdapterConfig> {
    let json: Json = serde_json::from_str(text).map_err(malformed)?;
    let dtype = |name: String| {
        DType::from_str(&name).map_err(|_| malformed(format!("lora_dtype is {name:?}")))
    };
    Ok(AdapterConfig {
        lora: LoraConfig {
            r: json.r,
            lora_alpha: json.lora_alpha,
            lora_dropout: json.lora_dropout,
            merge_weights: json.merge_weights,
            fan_in_fan_out: json.fan_in_fan_out,
            rslora: json.rslora,
            use_dora: json.use_dora,
            lora_bias: false,
            conv_kernels: false,
            init_lora_weights: InitLoraWeights::Uniform,
            lora_dtype: json.lora_dtype.map(dtype).transpose()?,
        },
        bias: json.bias.map_or(Ok(Bias::None), |bias| bias.parse())?,
        modules_to_save: json.modules_to_save,
        trainable_token_indices: json.trainable_token_indices,
        ensure_weight_tying: json.ensure_weight_tying,
        layers: json.layers,
        ..Default::default()
    })
}

fn malformed(reason: impl ToString) -> Error {
    let reason = format!("the configuration in its metadata: {}", reason.to_string());
    Error::Format { format: "loralib checkpoint", reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::LayerKind;

    #[test]
    fn a_configuration_round_trips() -> Result<()> {
        let lora = LoraConfig {
            r: 4,
            lora_alpha: 32.,
            lora_dropout: 0.05,
            merge_weights: false,
            fan_in_fan_out: true,
            rslora: true,
            use_dora: true,
            lora_dtype: Some(DType::BF16),
            ..Default::default()
        };
        let mut config = AdapterConfig::from(lora)
            .with_layer("q", LayerKind::Linear)
            .with_layer("qkv", LayerKind::MergedLinear(vec![true, false]))
            .with_layer("gqa", LayerKind::MergedSplits(vec![(4, true), (2, false)]))
            .with_layer("wte", LayerKind::Embedding)
            .with_layer("c1", LayerKind::Conv1d { groups: 1 })
            .with_layer("c2", LayerKind::Conv2d { groups: 2 })
            .with_layer("c3", LayerKind::Conv3d { groups: 3 })
            .with_layer("experts.down", LayerKind::Parameter { index: 1 });
        (config.bias, config.modules_to_save) = (Bias::All, vec!["head".to_owned()]);
        config.trainable_token_indices.insert("wte".to_owned(), vec![3, 1]);
        let own = config.layers.entry("q".to_owned()).or_default();
        (own.r, own.lora_alpha, own.fan_in_fan_out) = (Some(2), Some(3.), Some(false));
        config.layers.insert("unknown".to_owned(), LayerConfig::default());
        assert_eq!(from_json(&to_json(&config)?)?, config);
        let default = AdapterConfig::default();
        assert_eq!(from_json(&to_json(&default)?)?, default);
        Ok(())
    }

    /// As version 0.1 wrote it.
    #[test]
    fn old_metadata_is_read() -> Result<()> {
        let text = r#"{"fan_in_fan_out":false,"lora_alpha":3.0,"lora_dropout":0.05,"merge_weights":true,"r":2,"rslora":false}"#;
        let cfg = LoraConfig { r: 2, lora_alpha: 3., lora_dropout: 0.05, ..Default::default() };
        assert_eq!(from_json(text)?, cfg.into());
        assert_eq!(from_json(r#"{"r": 2, "lora_alpha": 3}"#)?.lora.scaling(), 1.5);
        Ok(())
    }

    #[test]
    fn missing_unknown_and_wrong_values_are_errors() {
        for bad in ["{}", r#"{"r": 2}"#, r#"{"lora_alpha": 3}"#] {
            assert!(from_json(bad).is_err(), "{bad}");
        }
        for bad in [
            r#""r": -1"#,
            r#""unknown": 1"#,
            r#""rslora": 1"#,
            r#""lora_dtype": "F3""#,
            r#""bias": "some""#,
            r#""layers": {"q": {"kind": "Other"}}"#,
            r#""layers": {"q": {"alpha": 1}}"#,
        ] {
            assert!(from_json(&format!(r#"{{"r": 2, "lora_alpha": 3, {bad}}}"#)).is_err(), "{bad}");
        }
    }
}
