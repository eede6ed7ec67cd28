//! The encoder on disk.

use super::config::{Config, Family};
use super::head::{Model, Task, CLASSIFIER};
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use lora::train::Pooling;
use lora::{Adapter, LoraWeights};
use loralib as lora;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tokenizers::{Tokenizer, TruncationParams};

/// Whether a folder has an encoder's configuration.
pub fn is_encoder(path: &Path) -> bool {
    let text = fs::read_to_string(path.join("config.json")).unwrap_or_default();
    serde_json::from_str(&text).is_ok_and(|json| Config::is_of(&json))
}

/// The pooling that sentence-transformers' `1_Pooling/config.json` says, in today's form or the older one.
fn pooling(json: &str) -> Result<Pooling> {
    let json: Value = serde_json::from_str(json)?;
    let name = match &json["pooling_mode"] {
        Value::String(name) => name.clone(),
        _ => {
            let old = [("cls", "cls_token"), ("mean", "mean_tokens"), ("lasttoken", "lasttoken")];
            let is = |(_, name): &(_, _)| json[format!("pooling_mode_{name}")] == true;
            old.into_iter().filter(is).map(|(name, _)| name).collect::<Vec<_>>().join("+")
        }
    };
    name.parse().map_err(|e| format!("{e}: give --pooling").into())
}

pub struct Base {
    path: PathBuf,
    config: Config,
    tokenizer: Tokenizer,
    pub device: Device,
}

impl Base {
    /// Sentences are cut off at `length` tokens, or where the model's positions end.
    pub fn read(path: &Path, length: usize, device: &Device) -> Result<Self> {
        let read = |name: &str| -> Result<String> {
            let file = path.join(name);
            Ok(fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?)
        };
        let at = |name: &str| path.join(name).display().to_string();
        let json: Value = serde_json::from_str(&read("config.json")?)
            .map_err(|e| format!("{}: {e}", at("config.json")))?;
        let config = Config::from_json(&json).map_err(|e| format!("{}: {e}", at("config.json")))?;
        let text = read("tokenizer.json")?;
        let tokenizer = || -> Result<Tokenizer> {
            let mut tokenizer: Tokenizer = text.parse()?;
            let max_length = length.min(config.longest());
            tokenizer.with_padding(None);
            let truncation = TruncationParams { max_length, ..Default::default() };
            tokenizer.with_truncation(Some(truncation))?;
            Ok(tokenizer)
        };
        let tokenizer = tokenizer().map_err(|e| format!("{}: {e}", at("tokenizer.json")))?;
        Ok(Self { path: path.to_owned(), config, tokenizer, device: device.clone() })
    }

    /// A sentence's tokens, with those that the model expects around them, and whether it was cut off.
    pub fn encode(&self, sentence: &str) -> Result<(Vec<u32>, bool)> {
        let encoding = self.tokenizer.encode(sentence, true)?;
        let (ids, count) = (encoding.get_ids(), self.config.vocab_size);
        match ids.iter().find(|id| **id as usize >= count) {
            Some(id) => Err(format!("the model takes {count} tokens, the text has {id}").into()),
            None => Ok((ids.to_vec(), !encoding.get_overflowing().is_empty())),
        }
    }

    /// The most tokens of a sentence.
    pub fn longest(&self) -> usize {
        self.tokenizer.get_truncation().map_or(usize::MAX, |truncation| truncation.max_length)
    }

    /// How a sentence becomes a vector: as sentence-transformers' files in the folder say, else the mean. An error if they have
    /// more behind the model.
    pub fn pooling(&self) -> Result<Pooling> {
        let read = |name: &str| -> Result<Option<String>> {
            let path = self.path.join(name);
            match path.exists() {
                true => Ok(Some(
                    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?,
                )),
                false => Ok(None),
            }
        };
        let at = |name: &str, e: &dyn std::fmt::Display| {
            format!("{}: {e}", self.path.join(name).display())
        };
        if let Some(text) = read("modules.json")? {
            let modules: Value = serde_json::from_str(&text).map_err(|e| at("modules.json", &e))?;
            let known = ["Transformer", "Pooling", "Normalize"];
            let types = modules.as_array().into_iter().flatten().filter_map(|m| m["type"].as_str());
            let mut names = types.map(|name| name.rsplit('.').next().unwrap_or(name));
            if let Some(other) = names.find(|name| !known.contains(name)) {
                let reason =
                    format!("a module {other} is behind the model, only {known:?} are supported");
                return Err(at("modules.json", &reason).into());
            }
        }
        let name = "1_Pooling/config.json";
        match read(name)? {
            Some(text) => Ok(pooling(&text).map_err(|e| at(name, &e))?),
            None => Ok(Pooling::Mean),
        }
    }

    /// A task for labels, in the order of the model's own head if it is one for them.
    pub fn classify(&self, labels: Vec<String>) -> Task {
        Task::Classify(self.config.ordered(&labels).unwrap_or(labels))
    }

    /// The folder.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// The widest rank that adds anything.
    pub fn widest(&self) -> usize {
        self.config.hidden_size
    }

    /// The folder, and what is in it.
    pub fn describe(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy();
        let Config { model_type, layers, hidden_size, .. } = &self.config;
        format!("{name} ({model_type}, {layers} layers of {hidden_size})")
    }

    /// That the model has each layer of an adapter, with the shape that it is for.
    pub fn check(&self, weights: &LoraWeights) -> Result<()> {
        let tensors = weights.state_dict();
        let scores = ["weight", "out_proj.weight"].map(|end| format!("{CLASSIFIER}.{end}"));
        let scores = scores.iter().find_map(|name| tensors.get(name));
        let task = match scores {
            Some(scores) => Task::Classify((0..scores.dim(0)?).map(|i| i.to_string()).collect()),
            None => Task::Embed(Pooling::Mean),
        };
        let (_, adapter) = self.model(&task, Adapter::from_weights(weights)?)?;
        Ok(adapter.check()?)
    }

    /// The encoder for a task, with an adapter. What the task needs and the folder does not have is new, and trained whole.
    pub fn model(&self, task: &Task, adapter: Adapter) -> Result<(Model, Adapter)> {
        let build = || -> Result<_> {
            let vb = lora::safetensors_var_builder(&self.path, DType::F32, &self.device)?;
            let names = Names::of(&self.config, task, &vb);
            let vb = vb.rename_f(move |name: &str| names.on_disk(name));
            let pooler = format!("{}.pooler.dense.weight", self.config.family.prefix());
            let trainable = task.trainable(&self.config, vb.contains_tensor(&pooler));
            let adapter = adapter.trainable(trainable)?;
            let model = Model::new(&self.config, task, adapter.var_builder(vb))?;
            Ok((model, adapter))
        };
        build().map_err(|e| format!("{}: {e}", self.path.display()).into())
    }
}

/// The names that an adapter's tensors have in the files of a folder with an encoder.
pub fn names(path: &Path) -> Result<Names> {
    let base = Base::read(path, usize::MAX, &Device::Cpu)?;
    let files = lora::safetensors_var_builder(path, DType::F32, &Device::Cpu)?;
    Ok(Names::of(&base.config, &Task::Embed(Pooling::Mean), &files))
}

/// The names that the tensors have in the folder's files.
pub struct Names {
    /// Of the encoder, in the files of a model with a head.
    prefix: Option<&'static str>,
    /// The norms of older files have a gamma and a beta.
    old_norms: bool,
    /// The files' head is of other labels.
    new_head: bool,
}

impl Names {
    fn of(config: &Config, task: &Task, files: &VarBuilder) -> Self {
        let prefix = config.family.prefix();
        let has = |name: &str| files.contains_tensor(name);
        let prefixed = has(&format!("{prefix}.embeddings.word_embeddings.weight"));
        let gamma = "embeddings.LayerNorm.gamma";
        Self {
            prefix: prefixed.then_some(prefix),
            old_norms: has(gamma) || has(&format!("{prefix}.{gamma}")),
            new_head: match task {
                Task::Classify(labels) => config.ordered(labels).as_ref() != Some(labels),
                Task::Embed(_) => false,
            },
        }
    }

    pub fn on_disk(&self, name: &str) -> String {
        let (first, rest) = name.split_once('.').unwrap_or((name, ""));
        if first == CLASSIFIER && self.new_head {
            return format!("{name} for other labels");
        }
        if matches!(first, CLASSIFIER | "pre_classifier") {
            return name.to_owned();
        }
        let name = if Family::is_prefix(first) { rest } else { name };
        let name = match self.old_norms {
            true => name
                .replace("LayerNorm.weight", "LayerNorm.gamma")
                .replace("LayerNorm.bias", "LayerNorm.beta"),
            false => name.to_owned(),
        };
        match self.prefix {
            Some(prefix) => format!("{prefix}.{name}"),
            None => name,
        }
    }
}
