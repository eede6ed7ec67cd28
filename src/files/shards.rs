//! The files of a checkpoint: one, or the shards of an index.

use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The names of a model in a folder, in order of preference.
const MODEL_NAMES: [&str; 4] = [
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
];

/// The files of one checkpoint.
#[derive(Debug)]
pub(crate) enum Shards {
    One(PathBuf),
    Many {
        folder: PathBuf,
        index: String,
        /// The files.
        names: BTreeSet<String>,
        tensors: BTreeSet<String>,
    },
}

impl Shards {
    pub fn find(path: &Path) -> Result<Self> {
        let path = if path.is_dir() {
            let names = MODEL_NAMES.iter().map(|name| path.join(name));
            names.into_iter().find(|path| path.exists()).ok_or_else(|| {
                let reason = format!("the folder has none of {MODEL_NAMES:?}");
                Error::Invalid(reason).at(path)
            })?
        } else {
            path.to_owned()
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.ends_with(".index.json") {
            return Ok(Self::One(path));
        }
        let map = fs::read(&path).map_err(Error::from).and_then(|text| weight_map(&text));
        let map = map.map_err(|e| e.at(&path))?;
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        let (tensors, names) = map.into_iter().unzip();
        Ok(Self::Many { folder, index: name, names, tensors })
    }

    /// An error if the index has a tensor that no file has.
    pub fn check(&self, has: impl Fn(&str) -> bool) -> Result<()> {
        let Self::Many { folder, index, tensors, .. } = self else { return Ok(()) };
        match tensors.iter().find(|name| !has(name)) {
            None => Ok(()),
            Some(name) => {
                let reason = "the index has it, but none of its files";
                Err(Error::tensor(name, reason).at(&folder.join(index)))
            }
        }
    }

    pub fn paths(&self) -> Vec<PathBuf> {
        match self {
            Self::One(path) => vec![path.clone()],
            Self::Many { folder, names, .. } => names.iter().map(|n| folder.join(n)).collect(),
        }
    }
}

/// The tensors of an index with their files, all in its folder.
fn weight_map(text: &[u8]) -> Result<Vec<(String, String)>> {
    let bad = |reason: String| Error::Format { format: "shard index", reason };
    let json: Value = serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return Err(bad("it has no weight_map".to_owned()));
    };
    map.iter()
        .map(|(tensor, shard)| match shard.as_str() {
            Some(shard) if Path::new(shard).file_name() == Some(shard.as_ref()) => {
                Ok((tensor.clone(), shard.to_owned()))
            }
            _ => Err(bad(format!(
                "{tensor:?} is in {shard}, expected a file in the folder of the index"
            ))),
        })
        .collect()
}
