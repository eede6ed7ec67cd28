//! The base model on disk: weights, config.json and tokenizer.json, as in a Hugging Face folder.

use crate::gpt2::{Config, Gpt2};
use crate::tokenizer::Tokenizer;
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use lora::{Bias, LoraConfig, StateDict};
use loralib as lora;
use serde_json::{json, Value};
use std::fs;
use std::path::{Path, PathBuf};

pub struct Base {
    pub path: PathBuf,
    pub config: Config,
    pub tokenizer: Tokenizer,
    pub tensors: StateDict,
    seed: u64,
    device: Device,
}

impl Base {
    /// Reads a safetensors file and what lies beside it, or a folder with model.safetensors. A new
    /// adapter of this base starts from `seed`.
    pub fn read(path: &Path, seed: u64, device: &Device) -> Result<Self> {
        let path = match path.is_dir() {
            true => path.join("model.safetensors"),
            false => path.to_owned(),
        };
        let tensors = lora::read_state_dict(&path, device)?.tensors;
        let config = path.with_file_name("config.json");
        let config = fs::read_to_string(&config)
            .map_err(Into::into)
            .and_then(|text| from_json(&text))
            .map_err(|e| format!("{}: {e}", config.display()))?;
        let tokenizer = Tokenizer::read(&path.with_file_name("tokenizer.json"))?;
        if tokenizer.len() > config.vocab_size {
            let (has, takes) = (tokenizer.len(), config.vocab_size);
            return Err(format!("the tokenizer has {has} tokens, the model takes {takes}").into());
        }
        let (tensors, device) = (own_names(tensors), device.clone());
        let base = Self { path, config, tokenizer, tensors, seed, device };
        base.check()?;
        Ok(base)
    }

    /// Writes a new base to `folder`, as base.safetensors.
    pub fn save(
        vars: &VarMap,
        config: &Config,
        tokenizer: &Tokenizer,
        folder: &Path,
    ) -> Result<PathBuf> {
        let data = vars.data().lock().map_err(|e| e.to_string())?;
        let tensors: StateDict =
            data.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
        let path = folder.join("base.safetensors");
        lora::save_state_dict(&tensors, LoraConfig::default(), &path)?;
        fs::write(folder.join("config.json"), to_json(config))?;
        tokenizer.save(&folder.join("tokenizer.json"))?;
        Ok(path)
    }

    /// The model without an adapter.
    pub fn plain(&self) -> Result<Gpt2> {
        self.build(LoraConfig::default(), self.weights())
    }

    /// The model with the adapter that is in `adapter`, or a new one that goes there.
    pub fn adapted(&self, cfg: LoraConfig, adapter: &VarMap, bias: Bias) -> Result<Gpt2> {
        self.build(cfg, lora::seeded(lora::var_builder(self.weights(), adapter, bias), self.seed))
    }

    pub fn parameters(&self) -> usize {
        self.tensors.values().map(|t| t.elem_count()).sum()
    }

    fn weights(&self) -> VarBuilder<'static> {
        let tensors = self.tensors.clone().into_iter().collect();
        VarBuilder::from_tensors(tensors, DType::F32, &self.device)
    }

    fn build(&self, cfg: LoraConfig, vb: VarBuilder) -> Result<Gpt2> {
        Gpt2::new(&self.config, cfg, vb).map_err(|e| format!("{}: {e}", self.path.display()).into())
    }

    /// An error for tensors that the model would ignore, and for those it lacks.
    fn check(&self) -> Result<()> {
        let known = |name: &str| match name.strip_prefix("h.").and_then(|n| n.split_once('.')) {
            Some((layer, _)) => layer.parse().is_ok_and(|layer: usize| layer < self.config.n_layer),
            None => ["wte.", "wpe.", "ln_f."].iter().any(|table| name.starts_with(table)),
        };
        if let Some((name, tensor)) = self.tensors.iter().find(|(name, _)| !known(name)) {
            let (path, shape) = (self.path.display(), tensor.dims());
            return Err(format!("{path}: no place in this GPT-2 for {name:?} {shape:?}").into());
        }
        self.plain().map(|_| ())
    }
}

/// Names without `transformer.`, and without what is no parameter: the tied head, and the masks of
/// older files.
fn own_names(tensors: StateDict) -> StateDict {
    let derived = |name: &str| {
        name == "lm_head.weight"
            || name.ends_with(".attn.bias")
            || name.ends_with(".attn.masked_bias")
    };
    let own = |name: String| name.strip_prefix("transformer.").map(str::to_owned).unwrap_or(name);
    tensors.into_iter().map(|(name, t)| (own(name), t)).filter(|(name, _)| !derived(name)).collect()
}

fn from_json(text: &str) -> Result<Config> {
    let json: Value = serde_json::from_str(text)?;
    let number = |key: &str| json[key].as_f64().ok_or(format!("no number {key:?}"));
    let size = |key: &str| json[key].as_u64().map(|n| n as usize).ok_or(format!("no size {key:?}"));
    let n_embd = size("n_embd")?;
    // What a GPT-2 may have otherwise and this one has not.
    for (key, only) in [
        ("model_type", json!("gpt2")),
        ("activation_function", json!("gelu_new")),
        ("n_inner", json!(4 * n_embd)),
        ("scale_attn_weights", json!(true)),
        ("scale_attn_by_inverse_layer_idx", json!(false)),
        ("tie_word_embeddings", json!(true)),
    ] {
        if !json[key].is_null() && json[key] != only {
            return Err(format!("{key} is {}, only {only} is supported", json[key]).into());
        }
    }
    Ok(Config {
        vocab_size: size("vocab_size")?,
        n_positions: size("n_positions")?,
        n_embd,
        n_layer: size("n_layer")?,
        n_head: size("n_head")?,
        layer_norm_epsilon: number("layer_norm_epsilon")?,
    })
}

fn to_json(c: &Config) -> String {
    let json = json!({
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": c.vocab_size,
        "n_positions": c.n_positions,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "layer_norm_epsilon": c.layer_norm_epsilon,
    });
    format!("{json:#}\n")
}
