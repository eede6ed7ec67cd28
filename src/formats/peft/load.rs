//! Reads a folder in PEFT's format.

use super::config::PeftConfig;
use super::folder::{refuse_others, BIN, CONFIG, SAFETENSORS};
use super::keys;
use super::pairs::{group, Grouped, Pair};
use super::parameters::rename;
use super::tokens::token_rows;
use crate::files::{read, StateDict};
use crate::formats::shapes::{experts_from_peft, from_peft_02, kind, layer_from_peft};
use crate::layers::LayerKind;
use crate::weights::{foreign_file, origin, AdapterConfig, Factors, LayerWeights, LoraWeights};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Reads an adapter that PEFT or [`save`](super::save) wrote. Each layer has its kind, and its own rank and alpha.
///
/// A layer over a linear one is a [`LayerKind::Linear`]. For a model with
/// [`MergedLinear`](crate::MergedLinear) layers see [`LoraWeights::with_kind`].
///
/// # Errors
/// If a file is missing or malformed, the configuration has an option that changes the update and is not
/// supported (initialisations that change the base, unknown keys with a value), keys have the adapter's
/// name, `target_parameters` do not tell which factors are whose, a layer is a convolution of several groups
/// as PEFT adapts them, a factor lacks the other, a shape does not fit the rank or the other factor, the
/// configuration does not include a tensor, or a value is not finite. The error names the file and the key
/// or tensor.
pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<LoraWeights> {
    let dir = dir.as_ref();
    if dir.is_file() {
        let tensors = read(dir, &Device::Cpu).map_err(|e| e.at(dir))?.0;
        let foreign = foreign_file(tensors.keys()).map(|(_, reason)| reason);
        let reason = foreign.or_else(|| tensors.keys().find_map(|name| origin(name)));
        let reason = reason.unwrap_or("give the folder");
        let reason = format!("it is a file, but PEFT's format is a folder: {reason}");
        return Err(Error::Invalid(reason).at(dir));
    }
    refuse_others(dir)?;
    let (text, path, tensors) = read_both(dir, device)?;
    let config = PeftConfig::parse(&text).and_then(PeftConfig::saved);
    let config = config.map_err(|e| e.at(&dir.join(CONFIG)))?;
    convert(config, tensors).map_err(|e| e.at(&path))
}

/// The configuration, and the tensors with their path. If a writer is replacing the adapter or was stopped
/// while it did, the configuration's file may be missing: then the one in the tensors' file counts.
fn read_both(dir: &Path, device: &Device) -> Result<(Vec<u8>, PathBuf, StateDict)> {
    let path = dir.join(CONFIG);
    let config = || match fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some).map_err(|e| Error::from(e).at(&path)),
    };
    for _ in 0..TRIES {
        let before = config()?;
        let safetensors = dir.join(SAFETENSORS);
        let file = match dir.join(BIN) {
            bin if bin.exists() && !safetensors.exists() => bin,
            _ => safetensors,
        };
        let (tensors, mut metadata) = read(&file, device).map_err(|e| e.at(&file))?;
        if config()? == before {
            let own = metadata.remove(CONFIG).map(String::into_bytes);
            let missing = || Error::Io(io::ErrorKind::NotFound.into()).at(&path);
            return Ok((before.or(own).ok_or_else(missing)?, file, tensors));
        }
    }
    let reason = format!("it was replaced {TRIES} times while the tensors were read");
    Err(Error::Invalid(reason).at(&path))
}

/// How often a reader starts again because a writer replaced the adapter meanwhile.
const TRIES: usize = 100;

fn convert(mut config: PeftConfig, tensors: StateDict) -> Result<LoraWeights> {
    let modules = &mut config.options.modules_to_save;
    *modules = keys::modules_in_file(modules, tensors.keys());
    let Grouped { pairs, tokens, others } = group(&config.options, tensors)?;
    let layers = rename(&config.target_parameters, pairs)?.into_iter().map(|(path, pair)| {
        let layer = layer(&config, &path, pair)?;
        Ok((path, layer))
    });
    let layers: BTreeMap<_, _> = layers.collect::<Result<_>>()?;
    let token_rows = token_rows(&config.token_indices, tokens)?;
    let options = AdapterConfig { layers: [].into(), ..config.options };
    Ok(LoraWeights { token_rows, others, ..LoraWeights::of_layers(options, layers)? })
}

fn layer(config: &PeftConfig, path: &str, pair: Pair) -> Result<LayerWeights> {
    let (a_key, b_key) = keys::pair(&pair.path, pair.embedding);
    let (a, b) = match (pair.a, pair.b) {
        (Some(a), Some(b)) => (a, b),
        (None, _) => return Err(Error::tensor(a_key, "it is missing")),
        (_, None) => return Err(Error::tensor(b_key, "it is missing")),
    };
    let magnitude_key = keys::magnitude(&pair.path);
    let magnitude = pair.magnitude.as_ref().map(|magnitude| (&magnitude_key, magnitude));
    for (key, tensor) in [(&a_key, &a), (&b_key, &b)].into_iter().chain(magnitude) {
        if !tensor.dtype().is_float() {
            return Err(Error::tensor(key, format!("it holds {:?}", tensor.dtype())));
        }
    }
    let bias_key = keys::bias_of_b(&pair.path);
    match (&pair.bias, config.lora_bias) {
        (None, true) => return Err(Error::tensor(bias_key, "it is missing, lora_bias is set")),
        (Some(_), false) => return Err(Error::tensor(bias_key, "lora_bias is not set")),
        _ => {}
    }
    let common = &config.options.lora;
    let r = config.patterns.rank(path)?.unwrap_or(common.r);
    let lora_alpha = config.patterns.alpha(path)?.unwrap_or(common.lora_alpha);
    let wrong_rank = |a: &Tensor| {
        let reason = format!("its shape is {:?}, the configuration's rank {r}", a.dims());
        Error::tensor(&a_key, reason)
    };
    let of_layer = |e: candle_core::Error| Error::tensor(&a_key, e);
    let declared = config.options.kind(path);
    let layer = match pair.parameter {
        Some(index) => {
            let pair = experts_from_peft(&a, &b, r).map_err(of_layer)?;
            let pair = pair.ok_or_else(|| wrong_rank(&a))?;
            let factors = Factors { a: pair.a, b: pair.b, r: pair.r, lora_alpha };
            LayerWeights::new(Some(LayerKind::Parameter { index }), factors)
        }
        None if (a.rank(), b.rank()) == (2, 3) => {
            let kind = declared.unwrap_or(&LayerKind::Linear).clone();
            let pair = from_peft_02(&kind, a, b, r).map_err(of_layer)?;
            let factors = Factors { a: pair.a, b: pair.b, r: pair.r, lora_alpha };
            LayerWeights::new(Some(kind), factors)
        }
        None if a.dims().first() != Some(&r) => return Err(wrong_rank(&a)),
        None => {
            let kind = kind([&a, &b], pair.embedding, declared)
                .map_err(|reason| Error::tensor(&a_key, reason))?;
            let factors = Factors { a, b, r, lora_alpha };
            layer_from_peft(kind, factors, common.rslora).map_err(of_layer)?
        }
    };
    let magnitude = pair.magnitude.map(|magnitude| magnitude.flatten_all()).transpose()?;
    Ok(LayerWeights { magnitude, bias: pair.bias, ..layer })
}
