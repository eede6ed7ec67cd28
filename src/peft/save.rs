//! Writes a folder in PEFT's format.

use super::convert::to_peft;
use super::factors::{plain_alpha, Factors};
use super::files::{BIN, CONFIG, SAFETENSORS};
use super::keys;
use super::parameters;
use super::tokens;
use super::uniform::{uniform, whole};
use super::write_config::write_config;
use crate::layers::{same_scaling, LayerKind, LoraConfig, MAGNITUDE};
use crate::utils::checkpoint::{folder, safetensors::serialize};
use crate::utils::names::{is_adapter, is_factor, is_lora, join, refuse_other_names, split};
use crate::utils::{factors, plain as plain_factors, AdapterConfig, StateDict};
use crate::{Error, Result};
use std::collections::BTreeSet;
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
    let config = config.into();
    write(dir.as_ref(), convert(tensors, &config, false))
}

/// [`save_pretrained`] for programs that take `lora_alpha / r` as the scaling of every layer, whatever
/// else the configuration says: llama.cpp's converter, Ollama, and older servers.
///
/// The file has no `use_rslora` and no patterns, but one rank, the largest, and one `lora_alpha`, a whole
/// number. Smaller factors are padded with zeros. A layer whose scaling this changes has the ratio
/// multiplied into its B, in F32 at least, which is exact if it is a power of two.
///
/// # Errors
/// As [`save_pretrained`], and if the adapter has `use_dora`, a `lora_bias`, token rows or parameters, which these
/// programs do not have.
pub fn save_plain(
    dir: impl AsRef<Path>,
    tensors: &StateDict,
    config: impl Into<AdapterConfig>,
) -> Result<()> {
    let config = config.into();
    write(dir.as_ref(), convert(tensors, &config, true))
}

fn write(dir: &Path, converted: Result<(StateDict, String)>) -> Result<()> {
    let write = || {
        let (converted, json) = converted?;
        let bytes = serialize(&converted, Some((CONFIG, json.clone())))?;
        folder::replace(dir, (SAFETENSORS, &bytes), (CONFIG, json.as_bytes()))?;
        Ok(folder::remove(&dir.join(BIN))?)
    };
    write().map_err(|e: Error| e.at(dir))
}

/// The tensors under PEFT's keys, and the configuration.
fn convert(
    tensors: &StateDict,
    config: &AdapterConfig,
    plain: bool,
) -> Result<(StateDict, String)> {
    refuse_other_names(tensors.keys())?;
    let (tensors, config) = &plain_factors(tensors, config)?;
    if plain {
        check_plain(tensors, config)?;
    }
    let factors = factors(tensors, config)?;
    let paths: BTreeSet<&str> = factors.keys().copied().collect();
    config.check_used(paths.iter().copied())?;
    let wrappers = parameters::wrappers(config, &paths);
    let (mut converted, mut pairs, mut layers) = (StateDict::new(), vec![], vec![]);
    for (path, [a, b]) in factors {
        if path.is_empty() {
            return Err(Error::tensor(
                "lora_A",
                "the layer has no name, which PEFT's format requires",
            ));
        }
        let kind = config.kind(path).unwrap_or(&LayerKind::Linear);
        let cfg = config.lora_config(path);
        cfg.validate(a.dtype()).map_err(|e| Error::tensor(join(path, "lora_A"), e))?;
        let factors = to_peft(kind, Factors { a: a.clone(), b: b.clone(), r: cfg.r })
            .map_err(|e| Error::tensor(join(path, "lora_A"), e))?;
        let in_file = wrappers.get(path).map_or(path, String::as_str);
        if let Some(magnitude) = tensors.get(&join(path, MAGNITUDE)) {
            // A convolution's has the rank of its output.
            let ones = kind.spatial().map_or(0, |(n, _)| n);
            let dims = [vec![1; ones.min(1)], magnitude.dims().to_vec(), vec![1; ones]].concat();
            converted.insert(keys::magnitude(in_file), magnitude.reshape(dims)?);
        }
        pairs.push((path, keys::pair(in_file, *kind == LayerKind::Embedding), factors, cfg));
    }
    let mut config = AdapterConfig::clone(config);
    if plain {
        let scaled = pairs.iter().map(|(_, _, f, cfg)| (plain_alpha(cfg, f.r), f.clone()));
        let (factors, lora_alpha, r) = uniform(scaled.collect(), whole)?;
        config.lora = LoraConfig { r, lora_alpha, rslora: false, ..config.lora };
        for (pair, factors) in pairs.iter_mut().zip(factors) {
            (pair.2, pair.3) = (factors, config.lora);
        }
    }
    let config = &config;
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

/// An error if the adapter changes the base by something else than the factors of layers.
fn check_plain(tensors: &StateDict, config: &AdapterConfig) -> Result<()> {
    let parameter =
        |name: &str| matches!(config.kind(split(name).0), Some(LayerKind::Parameter { .. }));
    let other = |name: &&String| is_adapter(name) && (!is_factor(name) || parameter(name));
    match tensors.keys().find(other) {
        None => Ok(()),
        Some(name) => {
            let reason = "these programs have lora_A and lora_B of layers alone: merge the adapter into the base";
            Err(Error::tensor(name, reason))
        }
    }
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
