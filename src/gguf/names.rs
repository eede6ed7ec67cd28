//! The names and the storage of one file's tensors.

use super::architecture::{Architecture, Pair, HEAD, MODEL};
use super::file::File;
use super::header::TensorInfo;
use super::metadata::{required, Metadata};
use super::rows;
use crate::{Error, Result};
use std::collections::BTreeMap;

/// llama.cpp's divisors of the rotation's frequencies, which the configuration tells.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

/// What is known of a file by its architecture.
pub(super) struct Names {
    architecture: &'static Architecture,
    layers: usize,
    /// The heads of q and of k.
    heads: (usize, usize),
}

impl Names {
    pub fn of(file: &File) -> Result<Self> {
        let architecture = Architecture::find(file.architecture())?;
        let metadata = Metadata(file.metadata());
        let integer = |key: &str| {
            let key = format!("{}.{key}", architecture.name);
            Ok::<_, Error>((metadata.integer(&key)?, key))
        };
        let need = |key: &str| {
            let (value, key) = integer(key)?;
            required(&key, value)
        };
        let heads = need("attention.head_count")?;
        let kv_heads = integer("attention.head_count_kv")?.0.unwrap_or(heads);
        Ok(Self { architecture, layers: need("block_count")?, heads: (heads, kv_heads) })
    }

    /// Hugging Face's name of a tensor of the file.
    pub fn hugging_face(&self, name: &str) -> Option<String> {
        self.translated(name, ("blk.", "model.layers."), |pair| *pair)
    }

    /// The file's name of a tensor of Hugging Face.
    pub fn gguf(&self, name: &str) -> Option<String> {
        self.translated(name, ("model.layers.", "blk."), |(gguf, own)| (*own, *gguf))
    }

    fn translated(&self, name: &str, layers: Pair, turn: impl Fn(&Pair) -> Pair) -> Option<String> {
        let other = |pairs: &mut dyn Iterator<Item = &'static Pair>, name: &str| {
            pairs.map(&turn).find(|(from, _)| *from == name).map(|(_, to)| to)
        };
        let Some((index, rest)) = name.strip_prefix(layers.0).and_then(|n| n.split_once('.'))
        else {
            let head = self.architecture.head.then_some(&HEAD);
            return other(&mut MODEL.iter().chain(head), name).map(str::to_owned);
        };
        let number = index.parse::<usize>().ok().filter(|number| *number < self.layers)?;
        let rest = other(&mut self.architecture.layer(), rest)?;
        // "07" is not the layer 7
        (number.to_string() == index).then(|| format!("{}{index}.{rest}", layers.1))
    }

    /// The heads whose rows are interleaved in this tensor of the file.
    pub fn interleaved(&self, name: &str) -> Option<usize> {
        let part = name.rsplit('.').nth(1).filter(|_| self.architecture.interleaved);
        match part? {
            "attn_q" => Some(self.heads.0),
            "attn_k" => Some(self.heads.1),
            _ => None,
        }
    }

    /// What is to be added to a tensor of the file to have Hugging Face's.
    pub fn shift(&self, name: &str) -> f64 {
        match self.architecture.norms_plus_one && name.ends_with("norm.weight") {
            true => -1.,
            false => 0.,
        }
    }

    /// The file's tensors by Hugging Face's names, with the file's.
    ///
    /// # Errors
    /// If there is a tensor without a name, or one that cannot be stored as it is.
    pub fn all(&self, file: &File) -> Result<BTreeMap<String, String>> {
        let known = file.tensors().filter(|(name, _)| *name != ROPE_FREQS);
        let named = known.map(|(name, info)| {
            let own = self.hugging_face(name).ok_or_else(|| self.unknown(name))?;
            self.check(name, info)?;
            Ok((own, name.to_owned()))
        });
        named.collect()
    }

    fn unknown(&self, name: &str) -> Error {
        let Self { architecture, layers, .. } = self;
        let reason = format!("a plain {} of {layers} layers has no such tensor", architecture.name);
        Error::tensor(name, reason)
    }

    fn check(&self, name: &str, info: &TensorInfo) -> Result<()> {
        let rank = if name.ends_with("norm.weight") || name.ends_with(".bias") { 1 } else { 2 };
        if info.dims.len() != rank {
            let reason = format!("its shape is {:?}, expected {rank} dimensions", info.dims);
            return Err(Error::tensor(name, reason));
        }
        let (rows, heads) = (info.dims.first().copied().unwrap_or(0), self.interleaved(name));
        match heads.filter(|heads| rows::in_file(rows, *heads).is_none()) {
            None => Ok(()),
            Some(heads) => {
                let reason = format!("its {rows} rows are not those of {heads} heads of pairs");
                Err(Error::tensor(name, reason))
            }
        }
    }
}
