//! The base models, as far as a format needs them: the names of their tensors, or a GGUF file.

use crate::Result;
use lora::{gguf, StateDict};
use loralib as lora;
use serde_json::{Map, Value};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

#[derive(Default)]
pub struct Bases {
    /// The names of all tensors, each after its component.
    pub names: Vec<String>,
    pub gguf: Option<gguf::File>,
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
                None => all.gguf = Some(gguf::File::open(base)?),
            }
        }
        Ok(all)
    }

    /// Also with the layers of an adapter, whose names are known.
    pub fn with_names_of(mut self, tensors: &StateDict) -> Self {
        let paths = tensors.keys().filter_map(|name| name.strip_suffix(".lora_A"));
        self.names = paths.map(|path| format!("{path}.weight")).collect();
        self
    }
}

/// The names in a safetensors file or an index of several; only its header is read.
fn names(path: &Path) -> Result<Vec<String>> {
    let failed = |e: &dyn ToString| format!("{}: {}", path.display(), e.to_string());
    let header = || {
        if path.extension().is_some_and(|end| end == "json") {
            let index: Map<String, Value> = serde_json::from_slice(&fs::read(path)?)?;
            let map = index.get("weight_map").and_then(Value::as_object).cloned();
            return map.ok_or("it has no weight_map".into());
        }
        let (mut file, mut length, mut header) = (File::open(path)?, [0; 8], vec![]);
        file.read_exact(&mut length)?;
        file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
        Ok(serde_json::from_slice::<Map<_, _>>(&header)?)
    };
    let header: Result<Map<_, _>> = header();
    Ok(header.map_err(|e| failed(&e))?.into_iter().map(|(name, _)| name).collect())
}
