//! A model's sizes and kind, with the names of Hugging Face's `config.json`.

use crate::Result;
use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub rms_norm_eps: f64,
    pub max_position_embeddings: usize,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    /// The newer form of the two before.
    rope_parameters: Option<RopeParameters>,
}

/// How positions become angles.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RopeParameters {
    pub rope_theta: Option<f64>,
    #[serde(alias = "type")]
    pub rope_type: Option<String>,
    pub factor: Option<f64>,
    pub low_freq_factor: Option<f64>,
    pub high_freq_factor: Option<f64>,
    pub original_max_position_embeddings: Option<usize>,
}

impl Config {
    /// An error names the option that is missing, or that this example does not support.
    pub fn from_json(json: Value) -> Result<Self> {
        let config: Self = serde_json::from_value(json)?;
        let (kind, act) = (&config.model_type[..], config.hidden_act.as_deref());
        if !["llama", "mistral", "qwen2", "qwen3"].contains(&kind) {
            let known = "llama, mistral, qwen2 and qwen3 are supported";
            return Err(format!("model_type is {kind:?}; {known}").into());
        }
        if let Some(act) = act.filter(|act| *act != "silu") {
            return Err(format!("hidden_act is {act:?}, only \"silu\" is supported").into());
        }
        let (heads, kv) = (config.num_attention_heads, config.kv_heads());
        if kv == 0 || heads == 0 || !heads.is_multiple_of(kv) {
            let message = format!("num_key_value_heads = {kv} does not divide {heads} heads");
            return Err(message.into());
        }
        Ok(config)
    }

    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Whether queries, keys and values have biases.
    pub fn qkv_bias(&self) -> bool {
        self.attention_bias || self.model_type == "qwen2"
    }

    /// Whether queries and keys are normed.
    pub fn qk_norm(&self) -> bool {
        self.model_type == "qwen3"
    }

    /// How many tokens the model takes: with more, some of them would not see the first, which the causal
    /// mask here does not express.
    pub fn longest(&self) -> usize {
        let slides = self.use_sliding_window.unwrap_or(self.model_type == "mistral");
        let window = self.sliding_window.filter(|_| slides).unwrap_or(usize::MAX);
        window.min(self.max_position_embeddings)
    }

    pub fn rope(&self) -> RopeParameters {
        let given = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let given = given.cloned().unwrap_or_default();
        RopeParameters { rope_theta: given.rope_theta.or(self.rope_theta), ..given }
    }
}
