//! What `config.json` says of an encoder.

use crate::Result;
use serde_json::{json, Value};

/// Models with the same modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Bert,
    Roberta,
    DistilBert,
}

impl Family {
    fn of(model_type: &str) -> Option<Self> {
        match model_type {
            "bert" => Some(Self::Bert),
            "roberta" | "xlm-roberta" | "camembert" => Some(Self::Roberta),
            "distilbert" => Some(Self::DistilBert),
            _ => None,
        }
    }

    /// Whether it is what one of the families has before the encoder's names.
    pub fn is_prefix(name: &str) -> bool {
        [Self::Bert, Self::Roberta, Self::DistilBert].iter().any(|family| family.prefix() == name)
    }

    /// What transformers calls the encoder in a model with a head.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roberta => "roberta",
            Self::DistilBert => "distilbert",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Config {
    pub family: Family,
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    /// Rows of the table of positions.
    pub positions: usize,
    /// The position of a first token: 0, and in RoBERTa the padding's id + 1.
    pub first_position: usize,
    /// Rows of the table of token types, or 0 without one.
    pub types: usize,
    pub eps: f64,
    /// The labels of the model's own head, in the order of its scores.
    pub labels: Vec<String>,
}

impl Config {
    /// Whether a configuration is of an encoder.
    pub fn is_of(json: &Value) -> bool {
        json["model_type"].as_str().and_then(Family::of).is_some()
    }

    /// Labels in the order of the model's own head, if it is one for these: by their names, or by numbers if it has no
    /// names.
    pub fn ordered(&self, labels: &[String]) -> Option<Vec<String>> {
        let same = |own: &[String]| {
            own.len() == labels.len() && own.iter().all(|label| labels.contains(label))
        };
        let unnamed = (0..self.labels.len()).all(|i| self.labels[i] == format!("LABEL_{i}"));
        let numbers: Vec<_> = (0..self.labels.len()).map(|i| i.to_string()).collect();
        match (same(&self.labels), unnamed && same(&numbers)) {
            (true, _) => Some(self.labels.clone()),
            (_, true) => Some(numbers),
            _ => None,
        }
    }

    /// The most tokens of a text.
    pub fn longest(&self) -> usize {
        self.positions.saturating_sub(self.first_position)
    }

    /// An error for what such a model may have otherwise and this one has not.
    pub fn from_json(json: &Value) -> Result<Self> {
        let model_type = json["model_type"].as_str().unwrap_or_default();
        let family =
            Family::of(model_type).ok_or_else(|| format!("model_type is {model_type:?}"))?;
        let size = |key: &str| match json[key].as_u64() {
            Some(n) if n > 0 => Ok(n as usize),
            _ => Err(format!("{key} is {}, expected a size", json[key])),
        };
        let bert = |key: &'static str, distilbert: &'static str| match family {
            Family::DistilBert => distilbert,
            _ => key,
        };
        for (key, only) in [
            (bert("hidden_act", "activation"), json!("gelu")),
            ("position_embedding_type", json!("absolute")),
            ("is_decoder", json!(false)),
            ("add_cross_attention", json!(false)),
        ] {
            if !json[key].is_null() && json[key] != only {
                return Err(format!("{key} is {}, only {only} is supported", json[key]).into());
            }
        }
        let hidden_size = size(bert("hidden_size", "dim"))?;
        let heads = size(bert("num_attention_heads", "n_heads"))?;
        if !hidden_size.is_multiple_of(heads) {
            return Err(format!("{heads} heads do not divide {hidden_size}").into());
        }
        let names = json["id2label"].as_object();
        let count = names.map_or(2, serde_json::Map::len);
        let label = |i: usize| {
            let name = names.and_then(|names| names.get(&i.to_string())?.as_str());
            name.map_or_else(|| format!("LABEL_{i}"), str::to_owned)
        };
        Ok(Self {
            vocab_size: size("vocab_size")?,
            hidden_size,
            intermediate_size: size(bert("intermediate_size", "hidden_dim"))?,
            layers: size(bert("num_hidden_layers", "n_layers"))?,
            heads,
            positions: size("max_position_embeddings")?,
            first_position: match family {
                Family::Roberta => json["pad_token_id"].as_u64().unwrap_or(1) as usize + 1,
                _ => 0,
            },
            types: match family {
                Family::DistilBert => 0,
                _ => json["type_vocab_size"].as_u64().unwrap_or(2) as usize,
            },
            eps: json["layer_norm_eps"].as_f64().unwrap_or(1e-12),
            labels: (0..count).map(label).collect(),
            family,
            model_type: model_type.to_owned(),
        })
    }
}
