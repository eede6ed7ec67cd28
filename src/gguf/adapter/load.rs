//! Reads an adapter in llama.cpp's form.

use super::place::Place;
use crate::files::check_finite;
use crate::gguf::file::File;
use crate::gguf::metadata::Metadata;
use crate::gguf::names::Names;
use crate::layers::LayerKind;
use crate::weights::{AdapterConfig, Factors, LayerWeights, LoraWeights};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Reads an adapter that [`save_adapter`](crate::gguf::save_adapter) or llama.cpp's `convert_lora_to_gguf.py` wrote,
/// for the layers of `base`. The layers have Hugging Face's paths, such as `model.layers.0.self_attn.q_proj`, and
/// factors in F32.
///
/// # Errors
/// If the file cannot be read or is malformed; if it is not a LoRA adapter, or one that counts for a part of
/// a text only (aLoRA); if its architecture is not the base's; if it has a tensor other than factors, such
/// as a norm, which llama.cpp ignores; if a factor is missing, is for a weight that the base lacks, or has
/// another shape; and if a value is not finite. The error names the file and the tensor.
pub fn load_adapter(path: impl AsRef<Path>, base: &File, device: &Device) -> Result<LoraWeights> {
    let file = File::open(path)?;
    read(&file, base, device).map_err(|error| error.at(file.path()))
}

fn read(file: &File, base: &File, device: &Device) -> Result<LoraWeights> {
    let metadata = Metadata(file.metadata());
    let alpha = check(metadata, file, base)?;
    let names = Names::of(base)?;
    let mut pairs = BTreeMap::<&str, [Option<&str>; 2]>::new();
    for name in file.tensor_names() {
        let (weight, at) = match name.rsplit_once('.') {
            Some((weight, "lora_a")) => (weight, 0),
            Some((weight, "lora_b")) => (weight, 1),
            _ => return Err(Error::tensor(name, "it is neither lora_a nor lora_b of a weight")),
        };
        pairs.entry(weight).or_default()[at] = Some(name);
    }
    let mut layers = BTreeMap::new();
    for (weight, pair) in pairs {
        let [Some(a_name), Some(b_name)] = pair else {
            return Err(Error::tensor(weight, "it has only one of lora_a and lora_b"));
        };
        let place = match base.find(weight) {
            None => {
                Err(Error::tensor(a_name, format!("{} lacks its weight", base.path().display())))
            }
            Some(_) => Place::find(base, &names, weight),
        }?;
        let own = names.hugging_face(weight);
        let Some(path) = own.as_deref().and_then(|own| own.strip_suffix(".weight")) else {
            return Err(Error::tensor(a_name, "its weight has no name of Hugging Face"));
        };
        let (a, b) = (values(file, a_name)?, values(file, b_name)?);
        let (a, b) = place.read(&a, &b).map_err(|e| Error::tensor(a_name, e))?;
        let r = b.dim(1)?;
        let kind = if place.embedding { LayerKind::Embedding } else { LayerKind::Linear };
        let (a, b) = (a.to_device(device)?, b.to_device(device)?);
        let factors = Factors { a, b, r, lora_alpha: alpha.unwrap_or(r as f64) };
        layers.insert(path.to_owned(), LayerWeights::new(Some(kind), factors));
    }
    if layers.is_empty() {
        return Err(Error::Invalid("it has no lora_a and lora_b".to_owned()));
    }
    // No layer has the default's rank, 0: the most frequent one becomes the common one.
    LoraWeights::of_layers(AdapterConfig::default(), layers)
}

/// An error unless this is an adapter for the base; its alpha, which llama.cpp ignores if it is 0.
fn check(metadata: Metadata, file: &File, base: &File) -> Result<Option<f64>> {
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        let value = metadata.string(key)?;
        if value != Some(expected) {
            let value = value.map_or("missing".to_owned(), |value| format!("{value:?}"));
            let reason = format!("its metadata {key:?} is {value}, expected {expected:?}");
            return Err(Error::Format { format: "LoRA adapter", reason });
        }
    }
    if metadata.get("adapter.alora.invocation_tokens").is_some() {
        let reason = "it counts only after its tokens in a text";
        return Err(Error::unsupported("an activated LoRA", reason));
    }
    let (own, other) = (file.architecture(), base.architecture());
    if own != other {
        return Err(Error::Invalid(format!(
            "it is an adapter of the architecture {own:?}, {} has {other:?}",
            base.path().display()
        )));
    }
    Ok(metadata.float("adapter.lora.alpha")?.filter(|alpha| *alpha != 0.))
}

/// A factor in F32 on the CPU.
fn values(file: &File, name: &str) -> Result<Tensor> {
    let tensor = file.read(name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
    check_finite(name, &tensor)?;
    Ok(tensor)
}
