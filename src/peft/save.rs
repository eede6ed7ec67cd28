//! Writing PEFT's folder.

use super::convert::{same_scaling, to_peft, Factors};
use super::write_config::write_config;
use super::{keys, Kind, PeftConfig, BIN, CONFIG, SAFETENSORS};
use crate::utils::{file::Staged, is_lora, join, serialize, split, StateDict};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

/// Writes an adapter as PEFT does, with the layers' kinds, ranks and alphas of `config`.
///
/// When all layers have one rank and one alpha, as vLLM needs it, there is no pattern in the file;
/// `one_rank` makes it so.
///
/// Each of the two files appears complete or not at all, and the tensors' also carries the
/// configuration. Where an adapter is replaced whose configuration differs, that is removed just
/// before the tensors take their place, and then the new one appears. So [`load_pretrained`] finds
/// the old adapter or the new one, whenever the writer is stopped. Python's PEFT does not look into
/// the tensors, nor are there options in those that it wrote: there, a crash between the steps leaves
/// an error, and never one adapter's tensors with another's options.
///
/// [`load_pretrained`]: super::load_pretrained
///
/// # Errors
/// When there is no adapter, a factor lacks the other or does not fit what the configuration says of
/// its layer, the configuration has a layer that the adapter lacks, PEFT would not carry a tensor
/// with these options, a value is not finite, or the file system refuses. The error names the tensor
/// and the file.
pub fn save_pretrained(
    dir: impl AsRef<Path>,
    tensors: &StateDict,
    config: impl Into<PeftConfig>,
) -> Result<()> {
    let (dir, config) = (dir.as_ref(), config.into());
    let (converted, json) = convert(tensors, &config).map_err(|e| e.at(dir))?;
    let bytes = serialize(&converted, Some((CONFIG, json.clone()))).map_err(|e| e.at(dir))?;
    let write = || {
        fs::create_dir_all(dir)?;
        let path = dir.join(CONFIG);
        let same = fs::read(&path).is_ok_and(|old| old == json.as_bytes());
        let tensors = Staged::new(&dir.join(SAFETENSORS), |file| file.write_all(&bytes))?;
        let config = Staged::new(&path, |file| file.write_all(json.as_bytes()))?;
        if !same {
            remove(&path)?;
        }
        tensors.rename()?;
        config.commit()?;
        remove(&dir.join(BIN))
    };
    write().map_err(|e: std::io::Error| Error::from(e).at(dir))
}

fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The tensors under PEFT's keys, and the configuration.
fn convert(tensors: &StateDict, config: &PeftConfig) -> Result<(StateDict, String)> {
    let paths: BTreeSet<&str> =
        tensors.keys().map(|name| split(name)).filter(|n| is_lora(n.1)).map(|n| n.0).collect();
    config.check_used(paths.iter().copied())?;
    let (mut converted, mut pairs, mut layers) = (StateDict::new(), vec![], vec![]);
    for &path in &paths {
        let factor = |last| {
            let name = join(path, last);
            tensors.get(&name).ok_or_else(|| Error::tensor(&name, "its other factor stands alone"))
        };
        let (a, b) = (factor("lora_A")?.clone(), factor("lora_B")?.clone());
        if path.is_empty() {
            return Err(Error::tensor("lora_A", "PEFT has no name for a layer without one"));
        }
        let kind = config.kind(path).unwrap_or(&Kind::Linear);
        let cfg = config.lora_config(path);
        cfg.validate(a.dtype()).map_err(|e| Error::tensor(join(path, "lora_A"), e))?;
        let factors = to_peft(kind, Factors { a, b, r: cfg.r })
            .map_err(|e| Error::tensor(join(path, "lora_A"), e))?;
        pairs.push((path, keys::pair(path, *kind == Kind::Embedding), factors, cfg));
    }
    let largest = pairs.iter().map(|(_, _, factors, _)| factors.r).max().unwrap_or(0);
    for (path, (a_key, b_key), Factors { a, b, r }, cfg) in pairs {
        let rank = if config.one_rank { largest } else { r };
        let alpha = same_scaling(cfg.lora_alpha, cfg.r, rank, cfg.rslora);
        if let Some(&(other, _, first)) = layers.first().filter(|_| config.one_rank) {
            if alpha != first {
                let reason = format!("its scaling is not that of {other}, which one_rank needs");
                return Err(Error::tensor(a_key, reason));
            }
        }
        layers.push((path, rank, alpha));
        converted.insert(a_key, a.pad_with_zeros(0, 0, rank - r)?);
        converted.insert(b_key, b.pad_with_zeros(1, 0, rank - r)?);
    }
    for (name, tensor) in tensors.iter().filter(|(name, _)| !is_lora(name)) {
        // A convolution's bias may stand under loralib's second name.
        let (layer, last) = split(name);
        let name = match split(layer) {
            (path, "conv") if paths.contains(path) => join(path, last),
            _ => name.clone(),
        };
        let adapted = paths.contains(split(&name).0);
        if !keys::is_carried(&name, config) {
            let reason = "it is neither in modules_to_save nor a bias that the adapter carries";
            return Err(Error::tensor(name, reason));
        }
        if converted.insert(keys::plain(&name, adapted), tensor.clone()).is_some() {
            return Err(Error::tensor(name, "the adapter has it under two names"));
        }
    }
    Ok((converted, write_config(config, &layers)?))
}
