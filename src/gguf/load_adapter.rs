//! Reads an adapter in llama.cpp's form.

use super::factors::Place;
use super::file::File;
use super::metadata::Metadata;
use super::names::Names;
use crate::layers::{LayerKind, LoraConfig};
use crate::peft::with_layers;
use crate::utils::names::{join, split};
use crate::utils::{check_finite, AdapterConfig, StateDict};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Reads an adapter that [`save_adapter`](super::save_adapter) or llama.cpp's `convert_lora_to_gguf.py` wrote,
/// for the layers of `base`: its configuration with the kinds, ranks and alphas of the layers, and its
/// factors in F32 by the crate's names, such as `model.layers.0.self_attn.q_proj.lora_A`.
///
/// # Errors
/// If the file cannot be read or is malformed; if it is not a LoRA adapter, or one that counts for a part of
/// a text only (aLoRA); if its architecture is not the base's; if it has a tensor other than factors, such
/// as a norm, which llama.cpp ignores; if a factor is missing, is for a weight that the base lacks, or has
/// another shape; and if a value is not finite. The error names the file and the tensor.
pub fn load_adapter(
    path: impl AsRef<Path>,
    base: &File,
    device: &Device,
) -> Result<(AdapterConfig, StateDict)> {
    let file = File::open(path)?;
    read(&file, base, device).map_err(|error| error.at(file.path()))
}

fn read(file: &File, base: &File, device: &Device) -> Result<(AdapterConfig, StateDict)> {
    let metadata = Metadata(file.metadata());
    let alpha = check(metadata, file, base)?;
    let names = Names::of(base)?;
    let mut pairs = BTreeMap::<&str, [Option<&str>; 2]>::new();
    for name in file.tensor_names() {
        let at = match split(name).1 {
            "lora_a" => 0,
            "lora_b" => 1,
            _ => return Err(Error::tensor(name, "it is neither lora_a nor lora_b of a weight")),
        };
        pairs.entry(split(name).0).or_default()[at] = Some(name);
    }
    let (mut layers, mut tensors) = (vec![], StateDict::new());
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
        let rank = b.dim(1)?;
        let kind = if place.embedding { LayerKind::Embedding } else { LayerKind::Linear };
        layers.push((path.to_owned(), kind, rank, alpha.unwrap_or(rank as f64)));
        for (last, factor) in [("lora_A", a), ("lora_B", b)] {
            tensors.insert(join(path, last), factor.to_device(device)?);
        }
    }
    if layers.is_empty() {
        return Err(Error::Invalid("it has no lora_a and lora_b".to_owned()));
    }
    // No layer has the rank 0: the most frequent rank becomes the common one.
    let none = AdapterConfig::from(LoraConfig { r: 0, ..Default::default() });
    Ok((with_layers(none, layers), tensors))
}

/// An error unless this is an adapter for the base; its alpha, which llama.cpp ignores if it is 0.
fn check(metadata: Metadata, file: &File, base: &File) -> Result<Option<f64>> {
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        let value = metadata.string(key)?;
        if value != Some(expected) {
            let reason = format!("its metadata {key:?} is {value:?}, expected {expected:?}");
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
