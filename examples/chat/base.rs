//! The model on disk: a Hugging Face folder, or a GGUF file. No other file knows which.

use crate::config::Config;
use crate::llama::Llama;
use crate::template::Template;
use crate::tokens::{text, Tokens};
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use loralib as lora;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

pub struct Base {
    pub path: PathBuf,
    pub config: Config,
    pub tokens: Tokens,
    /// `None` for a model that does not chat.
    pub template: Option<Template>,
    pub device: Device,
}

impl Base {
    pub fn read(path: &Path, device: &Device) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "gguf") {
            return Err(format!("{}: GGUF files cannot be read yet", path.display()).into());
        }
        Self::from_folder(path, device)
    }

    fn from_folder(path: &Path, device: &Device) -> Result<Self> {
        let json = json(&path.join("config.json"))?;
        let generation = optional(&path.join("generation_config.json"))?;
        let tokenizer = optional(&path.join("tokenizer_config.json"))?;
        let at = path.join("tokenizer.json");
        let ends = [&tokenizer["eos_token"], &generation["eos_token_id"], &json["eos_token_id"]];
        let tokens = fs::read(&at)
            .map_err(Into::into)
            .and_then(|text| Tokens::new(&text, &ends))
            .map_err(|e| format!("{}: {e}", at.display()))?;

        // Newer folders have the template in a file of its own.
        let at = path.join("chat_template.jinja");
        let source = match at.exists() {
            true => Some(fs::read_to_string(&at).map_err(|e| format!("{}: {e}", at.display()))?),
            false => template(&tokenizer["chat_template"]).map(str::to_owned),
        };
        let special = |name: &str| text(&tokenizer[name]).unwrap_or_default().to_owned();
        let template = source.map(|s| Template::new(s, special("bos_token"), special("eos_token")));
        let template = template.transpose().map_err(|e| format!("{}: {e}", path.display()))?;

        let config = Config::from_json(json)
            .map_err(|e| format!("{}: {e}", path.join("config.json").display()))?;
        if tokens.len() > config.vocab_size {
            let (has, takes) = (tokens.len(), config.vocab_size);
            return Err(format!("the tokenizer has {has} tokens, the model takes {takes}").into());
        }
        Ok(Self { path: path.to_owned(), config, tokens, template, device: device.clone() })
    }

    /// The frozen weights, read anew: a model keeps its own, and nothing else does.
    pub fn var_builder(&self) -> Result<VarBuilder<'static>> {
        let tensors = lora::read_state_dict(&self.path, &self.device)?.tensors;
        let tensors = tensors.into_iter().collect();
        Ok(VarBuilder::from_tensors(tensors, DType::F32, &self.device))
    }

    /// The model over `vb`, which is [`var_builder`](Self::var_builder) or an adapter's over it.
    pub fn model(&self, vb: VarBuilder) -> Result<Llama> {
        Llama::new(&self.config, vb).map_err(|e| format!("{}: {e}", self.path.display()).into())
    }
}

fn json(path: &Path) -> Result<Value> {
    let read = || -> Result<Value> { Ok(serde_json::from_str(&fs::read_to_string(path)?)?) };
    read().map_err(|e| format!("{}: {e}", path.display()).into())
}

/// `null` for a file that is not there.
fn optional(path: &Path) -> Result<Value> {
    match path.exists() {
        true => json(path),
        false => Ok(Value::Null),
    }
}

/// A template, or the default one of several.
fn template(value: &Value) -> Option<&str> {
    let default = |list: &'_ Vec<Value>| {
        list.iter().position(|template| template["name"] == "default").unwrap_or(0)
    };
    match value {
        Value::Array(list) => list.get(default(list))?["template"].as_str(),
        value => value.as_str(),
    }
}
