//! What `config.json` says of a BERT or RoBERTa.

use crate::Result;
use serde_json::{json, Value};

/// The sizes, with the names they have in `config.json`.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
    /// The position of a first token: 0, and in RoBERTa the padding's id + 1.
    pub first_position: usize,
}

impl Config {
    /// The most tokens of a sentence.
    pub fn longest(&self) -> usize {
        self.max_position_embeddings.saturating_sub(self.first_position)
    }

    /// An error for what such a model may have otherwise and this one has not.
    pub fn from_json(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text)?;
        let number = |key: &str| json[key].as_f64().ok_or(format!("no number {key:?}"));
        let size =
            |key: &str| json[key].as_u64().map(|n| n as usize).ok_or(format!("no size {key:?}"));
        let first_position = match json["model_type"].as_str() {
            Some("bert") => 0,
            Some("roberta" | "xlm-roberta" | "camembert") => size("pad_token_id")? + 1,
            other => return Err(format!("model_type is {other:?}, not bert or roberta").into()),
        };
        for (key, only) in [
            ("hidden_act", json!("gelu")),
            ("position_embedding_type", json!("absolute")),
            ("is_decoder", json!(false)),
        ] {
            if !json[key].is_null() && json[key] != only {
                return Err(format!("{key} is {}, only {only} is supported", json[key]).into());
            }
        }
        Ok(Self {
            vocab_size: size("vocab_size")?,
            hidden_size: size("hidden_size")?,
            num_hidden_layers: size("num_hidden_layers")?,
            num_attention_heads: size("num_attention_heads")?,
            intermediate_size: size("intermediate_size")?,
            max_position_embeddings: size("max_position_embeddings")?,
            type_vocab_size: size("type_vocab_size")?,
            layer_norm_eps: number("layer_norm_eps")?,
            first_position,
        })
    }
}
