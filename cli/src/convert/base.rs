//! The base models, as far as a format needs them: the names of their tensors, or a GGUF file.

use crate::Result;
use lora::{gguf, LoraWeights};
use loralib as lora;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

#[derive(Default)]
pub struct Bases {
    /// The names of all tensors, each after its component.
    pub names: Vec<String>,
    gguf: Option<gguf::File>,
}

impl Bases {
    pub fn open(bases: &[String]) -> Result<Self> {
        let mut all = Self::default();
        for base in bases {
            match base.split_once('=') {
                Some((component, path)) => {
                    let names = names(Path::new(path))?;
                    all.names.extend(names.iter().map(|name| format!("{component}.{name}")));
                }
                None => {
                    let hint = |e| format!("{e}; a safetensors file is given as COMPONENT=PATH");
                    all.gguf = Some(gguf::File::open(base).map_err(hint)?);
                }
            }
        }
        Ok(all)
    }

    /// The GGUF file.
    pub fn gguf(&self) -> Result<&gguf::File> {
        Ok(self.gguf.as_ref().ok_or("give the base by --base model.gguf")?)
    }

    /// Also with the layers of an adapter in components that have no base, whose names are known from it.
    pub fn with_names_of(mut self, weights: &LoraWeights) -> Self {
        let component = |name: &str| name.split('.').next().map(str::to_owned);
        let given: BTreeSet<_> = self.names.iter().map(|name| component(name)).collect();
        let paths = weights.layers().map(|(path, _)| path);
        let others = paths.filter(|path| !given.contains(&component(path)));
        self.names.extend(others.map(|path| format!("{path}.weight")));
        self
    }
}

/// The entries in the header of a safetensors file that are no tensors, without PEFT's and diffusers' options.
pub fn metadata(path: &Path) -> Result<Vec<String>> {
    let kept = ["format", "lora_adapter_metadata", "adapter_config.json"];
    let all = header(path)?.get("__metadata__").and_then(Value::as_object).cloned();
    let names = all.unwrap_or_default().into_iter().map(|(name, _)| name);
    Ok(names.filter(|name| !kept.contains(&name.as_str())).collect())
}

/// The names in a safetensors file or an index of several.
fn names(path: &Path) -> Result<Vec<String>> {
    let read = || -> Result<_> {
        if path.extension().is_some_and(|end| end == "json") {
            let index: Map<String, Value> = serde_json::from_slice(&fs::read(path)?)?;
            let map = index.get("weight_map").and_then(Value::as_object).cloned();
            return map.ok_or("it has no weight_map".into());
        }
        header(path)
    };
    let entries = read().map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(entries.into_iter().map(|(name, _)| name).collect())
}

/// The header of a safetensors file.
fn header(path: &Path) -> Result<Map<String, Value>> {
    let (mut file, mut length, mut header) = (File::open(path)?, [0; 8], vec![]);
    file.read_exact(&mut length)?;
    file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
    Ok(serde_json::from_slice(&header)?)
}
