//! The model on disk: a Hugging Face folder, or a GGUF file. No other file knows which.

use super::config::Config;
use super::decoder::Decoder;
use super::template::Template;
use super::tokens::Tokens;
use super::{folder, gguf};
use crate::format::is_gguf;
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use lora::{gguf::File, Adapter};
use loralib as lora;
use serde_json::Value;
use std::path::{Path, PathBuf};

pub struct Base {
    path: PathBuf,
    pub config: Config,
    pub tokens: Tokens,
    /// `None` for a model that does not chat.
    pub template: Option<Template>,
    pub device: Device,
    /// `None` for a folder.
    file: Option<File>,
}

impl Base {
    pub fn read(path: &Path, device: &Device) -> Result<Self> {
        if let Some(reason) = no_model(path) {
            return Err(format!("{}: {reason}", path.display()).into());
        }
        let file = path.is_file().then(|| File::open(path)).transpose()?;
        let texts = match &file {
            Some(file) => gguf::texts(file),
            None => folder::texts(path),
        };
        let build = |texts: Texts| -> Result<Self> {
            let config = Config::from_json(texts.config)?;
            // A tokenizer may have more, such as Gemma 3's for images.
            let tokens = texts.tokens.below(config.vocab_size);
            let (path, device) = (path.to_owned(), device.clone());
            Ok(Self { path, config, tokens, template: texts.template, device, file })
        };
        texts.and_then(build).map_err(|e| format!("{}: {e}", path.display()).into())
    }

    /// The frozen weights, read anew, in half precision if they are stored so.
    pub fn var_builder(&self) -> Result<VarBuilder<'static>> {
        if let Some(file) = &self.file {
            return Ok(file.var_builder(DType::F32, &self.device)?);
        }
        Ok(lora::base::half_var_builder(&self.path, DType::F32, &self.device)?)
    }

    /// The folder, from which PEFT can load the model; `None` for a GGUF file.
    pub fn folder(&self) -> Option<String> {
        self.file.is_none().then(|| self.path.display().to_string())
    }

    /// The GGUF file.
    pub fn gguf(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// The file or folder as it was given.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// The model's file or folder, and its kind.
    pub fn describe(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy();
        let Config { model_type, layers, hidden_size, .. } = &self.config;
        format!("{name} ({model_type}, {} layers of {hidden_size})", layers.len())
    }

    /// The model over `vb`, which is [`var_builder`](Self::var_builder) or an adapter's over it.
    pub fn model(&self, vb: VarBuilder) -> Result<Decoder> {
        Decoder::new(&self.config, vb).map_err(|e| format!("{}: {e}", self.path.display()).into())
    }

    /// Writes an adapter of this base in PEFT's format, and for a GGUF file also as adapter.gguf.
    pub fn save(&self, adapter: &Adapter, folder: &Path) -> Result<()> {
        adapter.save_pretrained(folder)?;
        match &self.file {
            Some(file) => Ok(adapter.save_gguf(folder.join("adapter.gguf"), file)?),
            None => Ok(()),
        }
    }
}

/// What a path is that is no model, as far as it can be told at once.
fn no_model(path: &Path) -> Option<&'static str> {
    let ends = |end: &str| path.extension().is_some_and(|extension| extension == end);
    if !path.exists() {
        Some("no such folder or file; models are not downloaded: `hf download NAME --local-dir FOLDER` does that")
    } else if path.is_file() && ends("safetensors") {
        Some("these are weights alone: give the folder, with config.json and tokenizer.json")
    } else if path.is_file() && !is_gguf(path).unwrap_or(true) {
        Some("it is neither a folder nor a GGUF file; the model comes first, then the data")
    } else if path.join("adapter_config.json").exists() && !path.join("config.json").exists() {
        Some("it is an adapter: give the model, and in `chat` the adapter by --adapter")
    } else {
        None
    }
}

/// What a model has besides its weights.
pub struct Texts {
    /// As config.json.
    pub config: Value,
    pub tokens: Tokens,
    pub template: Option<Template>,
}
