//! Writes a folder in PEFT's format.

use super::folder::{BIN, CONFIG, SAFETENSORS};
use super::keys;
use super::parameters;
use super::save_config::config_json;
use crate::files::{folder, serialize, StateDict};
use crate::formats::shapes::to_peft;
use crate::layers::{without_conv, LayerKind, LoraConfig, Part};
use crate::weights::{flattened_hint, is_close, uniform, Factors, LoraWeights};
use crate::{Error, Result};
use std::path::Path;

/// Writes an adapter as a folder in PEFT's format, with the kinds, ranks and alphas of its layers. A layer of unknown
/// kind is saved as a Linear.
///
/// If all layers have one rank and alpha, which vLLM requires, the file has no patterns;
/// [`one_rank`](crate::adapter::AdapterConfig::one_rank) makes it so.
///
/// Each file appears complete or not at all, and the tensors' file also contains the configuration:
/// [`load`](super::load) finds the old adapter or the new one, whenever the writer is stopped. If the
/// configuration changes, its old file is removed before the tensors are replaced. Python's PEFT does not
/// read the configuration in the tensors' file: after a crash in between, it reports an error.
///
/// # Errors
/// If a factor does not fit its layer's kind, PEFT would not save a tensor with these options, a
/// value is not finite, or the file system refuses. The error names the tensor and the file.
pub fn save(dir: impl AsRef<Path>, weights: &LoraWeights) -> Result<()> {
    write(dir.as_ref(), || convert(&*weights.joined()?, false))
}

/// [`save`] for programs that take `lora_alpha / r` as the scaling of every layer, whatever
/// else the configuration says: llama.cpp's converter, Ollama, and older servers.
///
/// The file has no `use_rslora` and no patterns, but one rank, the largest, and one `lora_alpha`, a whole
/// number. Smaller factors are padded with zeros. A layer whose scaling this changes has the ratio
/// multiplied into its B, in F32 at least, which is exact if it is a power of two.
///
/// # Errors
/// As [`save`], and if the adapter has `use_dora`, a `lora_bias`, token rows or parameters, which these
/// programs do not have.
pub fn save_plain(dir: impl AsRef<Path>, weights: &LoraWeights) -> Result<()> {
    write(dir.as_ref(), || convert(&*weights.joined()?, true))
}

fn write(dir: &Path, convert: impl FnOnce() -> Result<(StateDict, String)>) -> Result<()> {
    let write = || {
        let (converted, json) = convert()?;
        let bytes = serialize(&converted, Some((CONFIG, json.clone())))?;
        folder::replace(dir, (SAFETENSORS, &bytes), (CONFIG, json.as_bytes()))?;
        Ok(folder::remove(&dir.join(BIN))?)
    };
    write().map_err(|e: Error| e.at(dir))
}

/// The tensors under PEFT's keys, and the configuration; `plain` with one rank and one whole alpha.
fn convert(weights: &LoraWeights, plain: bool) -> Result<(StateDict, String)> {
    let rslora = weights.options.lora.rslora;
    let mut layers = vec![];
    for (path, layer) in weights.layers() {
        if path.is_empty() {
            let reason = "the layer has no name, which PEFT's format requires";
            return Err(Error::tensor(Part::A.name(), reason));
        }
        if let Some(hint) = flattened_hint(path) {
            return Err(Error::tensor(Part::A.at(path), hint));
        }
        let factors = layer.options(&weights.options.lora).validate(layer.a.dtype());
        let factors = factors.and_then(|()| to_peft(layer, rslora));
        layers.push((path, factors.map_err(|e| Error::tensor(Part::A.at(path), e))?));
    }
    let mut options = weights.options.clone();
    if let Some(path) = weights.tied_without_factors().filter(|_| options.ensure_weight_tying) {
        let reason = "the base's head follows this table if it is tied to it, which PEFT's file does not tell: merge the \
                      adapter or, if the head is not tied, set the configuration's ensure_weight_tying to false \
                      (`lora convert --untied-head`)";
        return Err(Error::tensor(Part::A.at(path), reason));
    }
    if plain {
        check_plain(weights)?;
        let (paths, own): (Vec<_>, Vec<_>) = layers.into_iter().unzip();
        let own = own.into_iter().map(|factors| factors.without_rslora(rslora)).collect();
        let (own, lora_alpha, r) = uniform(own, whole)?;
        options.lora = LoraConfig { r, lora_alpha, rslora: false, ..options.lora };
        layers = paths.into_iter().zip(own).collect();
    }
    let wrappers = parameters::wrappers(weights);
    let mut converted = StateDict::new();
    if options.one_rank {
        layers = one_rank(layers, |path| wrappers.contains_key(path), options.lora.rslora)?;
    }
    for (path, Factors { a, b, .. }) in &layers {
        let Some(layer) = weights.layers.get(*path) else { continue };
        let in_file = wrappers.get(path).map_or(*path, String::as_str);
        let embedding = layer.kind == Some(LayerKind::Embedding);
        let (a_key, b_key) = keys::pair(in_file, embedding);
        converted.extend([(a_key, a.clone()), (b_key, b.clone())]);
        if let Some(magnitude) = &layer.magnitude {
            // A convolution's has the rank of its output.
            let ones = layer.kind.as_ref().and_then(LayerKind::spatial).map_or(0, |(n, _)| n);
            let dims = [vec![1; ones.min(1)], magnitude.dims().to_vec(), vec![1; ones]].concat();
            converted.insert(keys::magnitude(in_file), magnitude.reshape(dims)?);
        }
        match &layer.bias {
            Some(bias) => drop(converted.insert(keys::bias_of_b(path), bias.clone())),
            None if weights.layers.values().any(|other| other.bias.is_some()) => {
                let reason = "it is missing, other layers have one";
                return Err(Error::tensor(Part::BiasOfB.at(path), reason));
            }
            None => {}
        }
    }
    let rows = weights.token_rows.iter();
    converted.extend(rows.map(|(path, own)| (keys::tokens(path), own.rows.clone())));
    for (name, tensor) in &weights.others {
        if converted.insert(other_key(name, weights)?, tensor.clone()).is_some() {
            return Err(Error::tensor(name, "the adapter has it under two names"));
        }
    }
    Ok((converted, config_json(&options, &layers, weights)?))
}

/// The factors with the largest rank, for which all layers need one scaling.
fn one_rank(
    layers: Vec<(&str, Factors)>,
    is_parameter: impl Fn(&str) -> bool,
    rslora: bool,
) -> Result<Vec<(&str, Factors)>> {
    let rank = layers.iter().map(|(_, own)| own.r).max().unwrap_or(0);
    let mut first = None;
    let padded = layers.into_iter().map(|(path, own)| {
        let r = own.r;
        if rank > r && is_parameter(path) {
            let reason =
                format!("its rank is {r}, and one_rank does not pad a parameter's to {rank}");
            return Err(Error::tensor(Part::A.at(path), reason));
        }
        let own = own.padded(rank, rslora)?;
        let (other, alpha) = *first.get_or_insert((path, own.lora_alpha));
        if !is_close(alpha, own.lora_alpha) {
            let reason = format!("its scaling is not that of {other}, which one_rank requires");
            return Err(Error::tensor(Part::A.at(path), reason));
        }
        Ok((path, Factors { lora_alpha: alpha, ..own }))
    });
    padded.collect()
}

/// The nearest whole number other than 0.
fn whole(alpha: f64) -> f64 {
    match alpha.round() {
        0. => 1f64.copysign(alpha),
        whole => whole,
    }
}

/// An error if the adapter changes the base by something else than the factors of layers.
fn check_plain(weights: &LoraWeights) -> Result<()> {
    let other = weights.layers().find_map(|(path, layer)| {
        let parameter = layer.is_parameter().then_some(Part::A);
        Some(layer.other_part().or(parameter)?.at(path))
    });
    let rows = || weights.token_rows.keys().next().map(|path| Part::TokenRows.at(path));
    match other.or_else(rows) {
        None => Ok(()),
        Some(name) => {
            let reason = "these programs have lora_A and lora_B of layers alone: merge the adapter into the base";
            Err(Error::tensor(name, reason))
        }
    }
}

/// The key of a whole tensor.
fn other_key(name: &str, weights: &LoraWeights) -> Result<String> {
    let adapted = |path: &str| weights.layers.contains_key(path);
    // conv.bias is loralib's second name of a convolution's bias.
    let (layer, part) = Part::parse(name);
    let path = without_conv(layer).filter(|path| adapted(path));
    let name = path.map_or(name.to_owned(), |path| part.at(path));
    if !keys::is_carried(&name, &weights.options) {
        let reason =
            "the configuration's modules_to_save and bias do not include it: select it, as by \
                      `Adapter::trainable`";
        return Err(Error::tensor(name, reason));
    }
    Ok(keys::base_key(&name, adapted(Part::parse(&name).0)))
}
