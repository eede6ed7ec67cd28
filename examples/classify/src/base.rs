//! The pretrained model on disk: a folder as the Hugging Face hub gives it.

use crate::classifier::Classifier;
use crate::config::Config;
use crate::names::own_names;
use crate::task::Task;
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use lora::{utils::StateDict, LoraConfig};
use loralib as lora;
use std::fs;
use std::path::Path;
use tokenizers::{Tokenizer, TruncationParams};

pub struct Base {
    config: Config,
    tensors: StateDict,
    tokenizer: Tokenizer,
    seed: u64,
    device: Device,
}

impl Base {
    /// Sentences are cut off at `max_length` tokens, or at the model's own limit. New weights of
    /// a model on this base start from `seed`.
    pub fn read(folder: &Path, max_length: usize, seed: u64, device: &Device) -> Result<Self> {
        let at = |name: &str| folder.join(name);
        let config = at("config.json");
        let config = fs::read_to_string(&config)
            .map_err(Into::into)
            .and_then(|text| Config::from_json(&text))
            .map_err(|e| format!("{}: {e}", config.display()))?;
        let path = at("model.safetensors");
        let tensors = lora::read_state_dict(&path, device)?.tensors;
        let tensors =
            own_names(tensors, &config).map_err(|e| format!("{}: {e}", path.display()))?;
        let path = at("tokenizer.json");
        let mut tokenizer =
            Tokenizer::from_file(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let max_length = max_length.min(config.longest());
        tokenizer.with_padding(None);
        tokenizer.with_truncation(Some(TruncationParams { max_length, ..Default::default() }))?;
        Ok(Self { config, tensors, tokenizer, seed, device: device.clone() })
    }

    /// The model for a task, with what is trained in `vars`.
    pub fn model(&self, task: &Task, lora: LoraConfig, vars: &VarMap) -> Result<Classifier> {
        let tensors = self.tensors.clone().into_iter().collect();
        let base = VarBuilder::from_tensors(tensors, DType::F32, &self.device);
        let vb = lora::base::seeded(lora::var_builder(base, vars, task.trainable()), self.seed);
        let (adapt, labels) = (task.adapt(lora), task.labels.len());
        Ok(Classifier::new(&self.config, &adapt, labels, task.pooling, vb)?)
    }

    /// A sentence's tokens, with those that the model expects around them.
    pub fn encode(&self, sentence: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(sentence, true)?.get_ids().to_vec())
    }

    /// How many parameters the encoder has.
    pub fn parameters(&self) -> usize {
        self.tensors.values().map(|t| t.elem_count()).sum()
    }
}
