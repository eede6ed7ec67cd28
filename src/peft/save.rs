//! Writes a folder in PEFT's format.

use super::convert::to_peft;
use super::factors::{same_scaling, Factors};
use super::files::{BIN, CONFIG, SAFETENSORS};
use super::keys;
use super::parameters;
use super::tokens;
use super::write_config::write_config;
use crate::layers::LayerKind;
use crate::utils::checkpoint::{atomic_file::Staged, safetensors::serialize};
use crate::utils::names::{is_lora, join, split};
use crate::utils::{AdapterConfig, StateDict};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

/// Writes an adapter as a folder in PEFT's format, with the kinds, ranks and alphas of `config`. An
/// undeclared layer is saved as a Linear.
///
/// If all layers have one rank and alpha, which vLLM requires, the file has no patterns;
/// [`one_rank`](AdapterConfig::one_rank) makes it so.
///
/// Each file appears complete or not at all, and the tensors' file also contains the configuration:
/// [`load_pretrained`] finds the old adapter or the new one, whenever the writer is stopped. If the
/// configuration changes, its old file is removed before the tensors are replaced. Python's PEFT does not
/// read the configuration in the tensors' file: after a crash in between, it reports an error.
///
/// [`load_pretrained`]: super::load_pretrained
///
/// # Errors
/// If there is no adapter, a factor lacks the other or does not fit its layer's options, the
/// configuration has a layer that the adapter lacks, PEFT would not save a tensor with these options, a
/// value is not finite, or the file system refuses. The error names the tensor and the file.
pub fn save_pretrained(
    dir: impl AsRef<Path>,
    tensors: &StateDict,
    config: impl Into<AdapterConfig>,
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
fn convert(tensors: &StateDict, config: &AdapterConfig) -> Result<(StateDict, String)> {
    let paths: BTreeSet<&str> =
        tensors.keys().map(|name| split(name)).filter(|n| is_lora(n.1)).map(|n| n.0).collect();
    config.check_used(paths.iter().copied())?;
    let wrappers = parameters::wrappers(config, &paths);
    let (mut converted, mut pairs, mut layers) = (StateDict::new(), vec![], vec![]);
    for &path in &paths {
        let factor = |last| {
            let name = join(path, last);
            tensors
                .get(&name)
                .ok_or_else(|| Error::tensor(&name, "it is missing, its other factor is there"))
        };
        let (a, b) = (factor("lora_A")?.clone(), factor("lora_B")?.clone());
        if path.is_empty() {
            return Err(Error::tensor(
                "lora_A",
                "the layer has no name, which PEFT's format requires",
            ));
        }
        let kind = config.kind(path).unwrap_or(&LayerKind::Linear);
        let cfg = config.lora_config(path);
        cfg.validate(a.dtype()).map_err(|e| Error::tensor(join(path, "lora_A"), e))?;
        let factors = to_peft(kind, Factors { a, b, r: cfg.r })
            .map_err(|e| Error::tensor(join(path, "lora_A"), e))?;
        let in_file = wrappers.get(path).map_or(path, String::as_str);
        pairs.push((path, keys::pair(in_file, *kind == LayerKind::Embedding), factors, cfg));
    }
    let largest = pairs.iter().map(|(_, _, factors, _)| factors.r).max().unwrap_or(0);
    for (path, (a_key, b_key), Factors { a, b, r }, cfg) in pairs {
        let rank = if config.one_rank { largest } else { r };
        let alpha = same_scaling(cfg.lora_alpha, cfg.r, rank, cfg.rslora);
        if let Some(&(other, _, first)) = layers.first().filter(|_| config.one_rank) {
            if alpha != first {
                let reason = format!("its scaling is not that of {other}, which one_rank requires");
                return Err(Error::tensor(a_key, reason));
            }
        }
        if rank > r && wrappers.contains_key(path) {
            let reason =
                format!("its rank is {r}, and one_rank does not pad a parameter's to {rank}");
            return Err(Error::tensor(a_key, reason));
        }
        layers.push((path, rank, alpha));
        converted.insert(a_key, a.pad_with_zeros(0, 0, rank - r)?);
        converted.insert(b_key, b.pad_with_zeros(1, 0, rank - r)?);
    }
    for (name, tensor) in tensors.iter().filter(|(name, _)| !is_lora(name)) {
        let key = other_key(name, config, &paths)?;
        if converted.insert(key, tensor.clone()).is_some() {
            return Err(Error::tensor(name, "the adapter has it under two names"));
        }
    }
    check_biases_of_b(tensors, &paths)?;
    tokens::check(config, tensors)?;
    Ok((converted, write_config(config, &layers, tensors)?))
}

/// The key of a tensor that is not a factor.
fn other_key(name: &str, config: &AdapterConfig, paths: &BTreeSet<&str>) -> Result<String> {
    let (layer, last) = split(name);
    match last {
        "lora_bias" if paths.contains(layer) => return Ok(keys::bias_of_b(layer)),
        "trainable_tokens" if config.trainable_token_indices.contains_key(layer) => {
            return Ok(keys::tokens(layer));
        }
        _ => {}
    }
    // conv.bias is loralib's second name of a convolution's bias.
    let name = match split(layer) {
        (path, "conv") if paths.contains(path) => join(path, last),
        _ => name.to_owned(),
    };
    if !keys::is_carried(&name, config) {
        let reason = "the configuration's modules_to_save and bias do not include it";
        return Err(Error::tensor(name, reason));
    }
    Ok(keys::base_key(&name, paths.contains(split(&name).0)))
}

/// An error if one layer has a bias of lora_B and another has not: PEFT has one option for all.
fn check_biases_of_b(tensors: &StateDict, paths: &BTreeSet<&str>) -> Result<()> {
    let missing = |path: &&&str| !tensors.contains_key(&join(path, "lora_bias"));
    match paths.iter().find(missing) {
        Some(path) if paths.iter().any(|path| !missing(&path)) => {
            Err(Error::tensor(join(path, "lora_bias"), "it is missing, other layers have one"))
        }
        _ => Ok(()),
    }
}
