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
    Many { folder: PathBuf, index: String, names: BTreeSet<String> },
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
        let names = fs::read(&path).map_err(Error::from).and_then(|text| shard_names(&text));
        let names = names.map_err(|e| e.at(&path))?;
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Self::Many { folder, index: name, names })
    }

    pub fn paths(&self) -> Vec<PathBuf> {
        match self {
            Self::One(path) => vec![path.clone()],
            Self::Many { folder, names, .. } => names.iter().map(|n| folder.join(n)).collect(),
        }
    }
}

/// The files of an index, all in its folder.
fn shard_names(text: &[u8]) -> Result<BTreeSet<String>> {
    let bad = |reason: String| Error::Format { format: "shard index", reason };
    let json: Value = serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return Err(bad("it has no weight_map".to_owned()));
    };
    map.iter()
        .map(|(tensor, shard)| match shard.as_str() {
            Some(shard) if Path::new(shard).file_name() == Some(shard.as_ref()) => {
                Ok(shard.to_owned())
            }
            _ => Err(bad(format!(
                "{tensor:?} is in {shard}, expected a file in the folder of the index"
            ))),
        })
        .collect()
}
