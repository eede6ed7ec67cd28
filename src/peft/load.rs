//! Reads a folder in PEFT's format.

use super::convert::from_peft;
use super::experts;
use super::files::{BIN, CONFIG, SAFETENSORS};
use super::keys;
use super::merged;
use super::modules;
use super::pairs::{group, Grouped};
use super::parameters::rename;
use super::rank_alpha::with_layers;
use super::read_config::{read_saved_config, Json};
use super::tokens;
use crate::layers::{same_scaling, LayerKind, MAGNITUDE};
use crate::utils::checkpoint::read;
use crate::utils::names::join;
use crate::utils::{check_magnitudes, AdapterConfig, StateDict};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Reads an adapter that PEFT or [`save_pretrained`](super::save_pretrained) wrote, in loralib's names and
/// shapes. The configuration has the kind of each layer, and its rank and alpha if they are not the common
/// ones.
///
/// A layer over a linear one is a [`LayerKind::Linear`]. For a model with
/// [`MergedLinear`](crate::MergedLinear) layers use [`load_pretrained_as`].
///
/// # Errors
/// If a file is missing or malformed, the configuration has an option that changes the update and is not
/// supported (initialisations that change the base, unknown keys with a value), keys have the adapter's
/// name, `target_parameters` do not tell which factors are whose, a layer is a convolution of several groups
/// as PEFT adapts them, a factor lacks the other, a shape does not fit the rank or the other factor, the
/// configuration does not include a tensor, or a value is not finite. The error names the file and the key
/// or tensor.
pub fn load_pretrained(
    dir: impl AsRef<Path>,
    device: &Device,
) -> Result<(AdapterConfig, StateDict)> {
    load_pretrained_as::<&str>(dir, &[], device)
}

/// [`load_pretrained`] for a model in which layers have other kinds, mostly
/// [`MergedLinear`](crate::MergedLinear): each by its path or the end of it after a dot.
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// use loralib::{layers::LayerKind, peft};
/// let c_attn = ("c_attn", LayerKind::MergedLinear(vec![true, false, true]));
/// let device = candle_core::Device::Cpu;
/// let (config, tensors) = peft::load_pretrained_as("adapter", &[c_attn], &device)?;
/// # let _ = (config, tensors); Ok(()) }
/// ```
///
/// # Errors
/// As [`load_pretrained`]; if the adapter lacks a named layer; and if the layer has another kind or updates
/// outputs that are not enabled.
pub fn load_pretrained_as<S: AsRef<str>>(
    dir: impl AsRef<Path>,
    kinds: &[(S, LayerKind)],
    device: &Device,
) -> Result<(AdapterConfig, StateDict)> {
    let dir = dir.as_ref();
    if dir.is_file() {
        let reason = "it is a file, but PEFT's format is a folder; read loralib's files with \
                      `load_checkpoint` or `read_adapter`";
        return Err(Error::Invalid(reason.to_owned()).at(dir));
    }
    let (text, path, tensors) = read_both(dir, device)?;
    let mut json = read_saved_config(&text).map_err(|e| e.at(&dir.join(CONFIG)))?;
    for (module, kind) in kinds {
        json.config = json.config.with_layer(module.as_ref(), kind.clone());
    }
    convert(json, tensors).map_err(|e| e.at(&path))
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

fn convert(mut json: Json, tensors: StateDict) -> Result<(AdapterConfig, StateDict)> {
    modules::keep_found(&mut json.config, tensors.keys());
    let Grouped { pairs, tokens, others: mut loaded } = group(&json.config, tensors)?;
    let pairs = rename(&json.target_parameters, pairs)?;
    json.config.check_used(pairs.keys().map(String::as_str))?;
    json.config.trainable_token_indices = tokens::indices(&json.token_indices, &tokens)?;
    loaded.extend(tokens.into_iter().map(|(path, rows)| (join(&path, "trainable_tokens"), rows)));
    let given = &json.config.lora;
    let mut layers = vec![];
    for (path, pair) in pairs {
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
        match (pair.bias, json.lora_bias) {
            (Some(bias), true) => drop(loaded.insert(join(&path, "lora_bias"), bias)),
            (None, true) => return Err(Error::tensor(bias_key, "it is missing, lora_bias is set")),
            (Some(_), false) => return Err(Error::tensor(bias_key, "lora_bias is not set")),
            (None, false) => {}
        }
        if let Some(magnitude) = pair.magnitude {
            loaded.insert(join(&path, MAGNITUDE), magnitude.flatten_all()?);
        }
        let r = json.patterns.rank(&path)?.unwrap_or(given.r);
        let alpha = json.patterns.alpha(&path)?.unwrap_or(given.lora_alpha);
        let wrong_rank = || {
            let reason = format!("its shape is {:?}, the configuration's rank {r}", a.dims());
            Error::tensor(&a_key, reason)
        };
        let (kind, factors) = match pair.parameter {
            Some(index) => {
                let factors =
                    experts::from_peft(&a, &b, r).map_err(|e| Error::tensor(&a_key, e))?;
                (LayerKind::Parameter { index }, factors.ok_or_else(wrong_rank)?)
            }
            None if (a.rank(), b.rank()) == (2, 3) => {
                let kind = json.config.kind(&path).unwrap_or(&LayerKind::Linear).clone();
                let factors = merged::from_peft_02(&kind, a, b, r);
                (kind, factors.map_err(|e| Error::tensor(&a_key, e))?)
            }
            None if a.dims().first() != Some(&r) => return Err(wrong_rank()),
            None => {
                let kind = kind([&a, &b], pair.embedding, json.config.kind(&path))
                    .map_err(|reason| Error::tensor(&a_key, reason))?;
                let factors = from_peft(&kind, a, b).map_err(|e| Error::tensor(&a_key, e))?;
                (kind, factors)
            }
        };
        let alpha = same_scaling(alpha, r, factors.r, given.rslora);
        loaded.insert(join(&path, "lora_A"), factors.a);
        loaded.insert(join(&path, "lora_B"), factors.b);
        layers.push((path, kind, factors.r, alpha));
    }
    let config = with_layers(json.config, layers);
    check_magnitudes(&loaded, &config)?;
    Ok((config, loaded))
}

/// The kind by the shapes of the factors. An error if it contradicts the `given` one.
pub(crate) fn kind(
    [a, b]: [&Tensor; 2],
    embedding: bool,
    given: Option<&LayerKind>,
) -> std::result::Result<LayerKind, String> {
    // A has the ranks of all groups, B those of one.
    let groups = match (a.dims(), b.dims()) {
        (&[ranks, ..], &[_, own, ..]) if ranks.checked_rem(own) == Some(0) => ranks / own,
        _ => 1,
    };
    let found = match (a.rank(), embedding) {
        (2, true) => LayerKind::Embedding,
        (2, false) => LayerKind::Linear,
        (3, false) => LayerKind::Conv1d { groups },
        (4, false) => LayerKind::Conv2d { groups },
        (5, false) => LayerKind::Conv3d { groups },
        _ => return Err(format!("its shape is {:?}", a.dims())),
    };
    match given {
        Some(given @ (LayerKind::MergedLinear(_) | LayerKind::MergedSplits(_)))
            if found == LayerKind::Linear =>
        {
            Ok(given.clone())
        }
        Some(given) if *given != found => {
            Err(format!("its layer is a {found:?}, declared as a {given:?}"))
        }
        _ => Ok(found),
    }
}
