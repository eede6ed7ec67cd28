//! What a checkpoint was trained for, and how: METHOD.json, beside METHOD.safetensors.

use crate::bert::Adapt;
use crate::Result;
use lora::{utils::Trainable, Bias, LoraConfig};
use loralib as lora;
use loralib::train::Pooling;
use serde_json::{json, Value};
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Head,
    Lora,
    Full,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Lora => "lora",
            Self::Full => "full",
        }
    }

    /// The rate at its peak; for LoRA and full fine-tuning the best of a few, in two epochs, on training
    /// sentences that were held out.
    pub fn lr(self) -> f64 {
        match self {
            Self::Head => 1e-2,
            Self::Lora => 4e-3,
            Self::Full => 4e-4,
        }
    }

    /// Where the checkpoint lies in a folder.
    pub fn checkpoint(self, folder: &Path) -> PathBuf {
        folder.join(self.name()).with_extension("safetensors")
    }
}

pub struct Task {
    pub method: Method,
    pub labels: Vec<String>,
    pub pooling: Pooling,
    pub targets: Vec<String>,
    pub bias: Bias,
    pub max_length: usize,
}

impl Task {
    /// What is trained and saved. The head is new, whatever the base has.
    pub fn trainable(&self) -> Trainable {
        match self.method {
            Method::Head => Bias::None.and("classifier"),
            Method::Lora => self.bias.and("classifier"),
            Method::Full => Trainable::all_parameters().and("classifier"),
        }
    }

    pub fn adapt(&self, lora: LoraConfig) -> Adapt {
        Adapt { lora, targets: self.targets.clone() }
    }

    pub fn save(&self, folder: &Path) -> Result<()> {
        let json = json!({
            "labels": self.labels,
            "pooling": self.pooling.to_string(),
            "targets": self.targets,
            "bias": self.bias.to_string(),
            "max_length": self.max_length,
        });
        Ok(fs::write(self.method.checkpoint(folder).with_extension("json"), format!("{json:#}\n"))?)
    }

    pub fn read(method: Method, folder: &Path) -> Result<Self> {
        let path = method.checkpoint(folder).with_extension("json");
        let read = || {
            let json: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
            let text = |key: &str| json[key].as_str().ok_or(format!("no text {key:?}"));
            let list = |key: &str| {
                let list = json[key].as_array().ok_or(format!("no list {key:?}"))?;
                let word = |v: &Value| v.as_str().map(str::to_owned);
                let words: Option<Vec<String>> = list.iter().map(word).collect();
                words.ok_or(format!("{key:?} is no list of words"))
            };
            Ok(Self {
                method,
                labels: list("labels")?,
                pooling: text("pooling")?.parse()?,
                targets: list("targets")?,
                bias: text("bias")?.parse()?,
                max_length: json["max_length"].as_u64().ok_or("no size \"max_length\"")? as usize,
            })
        };
        read().map_err(|e: crate::Error| format!("{}: {e}", path.display()).into())
    }
}
