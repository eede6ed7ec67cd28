//! The files of diffusers: `pytorch_lora_weights.safetensors`, with the layers of all models of a pipeline.
//!
//! A layer's factors are `unet.<path>.lora_A.weight` and `.lora_B.weight`; a text encoder's are
//! `text_encoder.<path>.lora_linear_layer.down.weight` and `.up.weight`. Ranks and alphas are in the metadata of the
//! file's header, as PEFT's configuration of each component; without them alpha is r. Older names are read
//! too.

mod keys;
mod metadata;

use self::keys::Key;
use super::layers::{adapter, layers, Pairs};
use crate::files::{atomic_file, read, serialize, StateDict};
use crate::weights::{
    has_component, refuse_other_methods, refuse_other_names, AdapterConfig, LoraWeights,
};
use crate::{Error, Result};
use candle_core::Device;
use metadata::{Components, METADATA};
use std::fs;
use std::path::{Path, PathBuf};

const FILE: &str = "pytorch_lora_weights.safetensors";

const UNKNOWN_COMPONENT: &str =
    "its name does not begin with a component of diffusers, such as `unet.`, and the file has no metadata: add \
     the component to the names";

/// Reads a file, or the one in a folder, into the crate's names, which begin with the component as the
/// file's do: `unet.`, `transformer.`, `text_encoder.` and others. Of the options that do not change the update
/// (`lora_dropout`, the name of the base, the type of task), those that all components have are kept.
///
/// # Errors
/// If the file cannot be read or is malformed; if a name is none of LoRA's, such as `lora_magnitude_vector`, or is
/// PEFT's or kohya's; if names begin with no known component, and there is no metadata; if an option in the metadata
/// changes the update and is not supported, or differs among the components; if a layer lacks a factor; if shapes do
/// not fit each other or the metadata; and if a value is not finite. The error names the file and the tensor.
pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<LoraWeights> {
    let path = file(path.as_ref());
    let load = || {
        let (tensors, metadata) = read(&path, device)?;
        refuse_other_names(tensors.keys())?;
        refuse_other_methods(tensors.keys())?;
        let mut pairs = Pairs::default();
        for (key, tensor) in tensors {
            let Key { path, role } = keys::parse(&key)?;
            pairs.insert(path, role, key, tensor)?;
        }
        let mut layers = pairs.into_layers()?;
        let Some(text) = metadata.get(METADATA) else {
            if let Some(layer) = layers.iter().find(|layer| !has_component(&layer.path)) {
                return Err(Error::tensor(&layer.key, UNKNOWN_COMPONENT));
            }
            return adapter(AdapterConfig::default(), layers);
        };
        let components = Components::read(text)?;
        for layer in &mut layers {
            if layer.alpha.is_some() {
                let reason = "its layer has an alpha as a tensor and one in the metadata";
                return Err(Error::tensor(&layer.key, reason));
            }
            let (r, alpha) = components.rank_alpha(&layer.path, &layer.key)?;
            if layer.a.dims().first() != Some(&r) {
                let reason = format!("its shape is {:?}, the metadata's rank {r}", layer.a.dims());
                return Err(Error::tensor(&layer.key, reason));
            }
            layer.alpha = Some(alpha);
        }
        adapter(components.config()?, layers)
    };
    load().map_err(|e: Error| e.at(&path))
}

/// Writes an adapter, whose names begin with the component, as [`load`] gives them. Factors keep their bits;
/// ranks, alphas, `rslora` and `lora_dropout` are in the metadata. Versions of diffusers before 0.34 do not
/// read them, and take alpha as r.
///
/// A `path` that ends in `.safetensors` is the file's; any other is a folder. The file appears complete and
/// flushed to disk, or not at all. Equal contents give equal bytes.
///
/// # Errors
/// If the adapter has something other than factors, or an embedding; if a name has no component; if a value
/// is not finite; and if the file system refuses.
pub fn save(path: impl AsRef<Path>, weights: &LoraWeights) -> Result<()> {
    let path = file(path.as_ref());
    let save = || {
        let weights = &*weights.joined()?;
        let layers = layers(weights, "diffusers' format", weights.options.lora.fan_in_fan_out)?;
        let metadata = metadata::write(weights, &layers)?;
        let mut file = StateDict::new();
        for (path, _, factors) in layers {
            let [a, b] = keys::pair(path);
            file.extend([(a, factors.a), (b, factors.b)]);
        }
        let bytes = serialize(&file, Some((METADATA, metadata)))?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        Ok(atomic_file::replace(&path, &bytes)?)
    };
    save().map_err(|e: Error| e.at(&path))
}

fn file(path: &Path) -> PathBuf {
    let is_file = path.is_file() || path.extension().is_some_and(|end| end == "safetensors");
    if is_file {
        path.to_owned()
    } else {
        path.join(FILE)
    }
}
