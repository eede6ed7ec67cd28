//! The files of kohya's sd-scripts, which AUTOMATIC1111, ComfyUI and civitai use: one safetensors file with
//! flattened names.
//!
//! A layer `unet.down_blocks.0.attentions.0.proj_in` is `lora_unet_down_blocks_0_attentions_0_proj_in`, then
//! `.lora_down.weight`, which is A, `.lora_up.weight`, which is B, and `.alpha`. Without `.alpha`, or if it is 0, the
//! update is not scaled: alpha is r.

mod names;

use super::layers::{adapter, layers, Pairs, Role};
use crate::files::{atomic_file, read, serialize, StateDict};
use crate::layers::{LayerKind, Part};
use crate::weights::{origin, refuse_other_methods, AdapterConfig, LoraWeights};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use names::{Modules, Names};
use std::collections::BTreeMap;
use std::path::Path;

/// Reads a file. The dots of a path are not in it: the layers have the flattened names, until [`with_paths`] gives them
/// the paths in a model.
///
/// # Errors
/// If the file cannot be read or is malformed; if a name is none of LoRA's, such as LyCORIS' `lokr_w1` and
/// `hada_w1_a`, `lora_mid` and `dora_scale`; if a layer lacks a factor; if shapes do not fit; and if a value is not
/// finite. The error names the file and the tensor.
pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<LoraWeights> {
    let path = path.as_ref();
    let load = || {
        let mut pairs = Pairs::default();
        let tensors = read(path, device)?.0;
        refuse_other_methods(tensors.keys())?;
        for (key, tensor) in tensors {
            let (flat, role) = parse(&key)?;
            let flat = flat.to_owned();
            pairs.insert(flat, role, key, tensor)?;
        }
        let mut layers = pairs.into_layers()?;
        for layer in &mut layers {
            layer.alpha = layer.alpha.filter(|alpha| *alpha != 0.);
        }
        adapter(AdapterConfig::default(), layers)
    };
    load().map_err(|e: Error| e.at(path))
}

/// An adapter of [`load`] by the paths in the models, which begin with the component: `unet.`, `transformer.`,
/// `text_encoder.`, `text_encoder_2.` or `text_encoder_3.`.
///
/// `names` are the names of all tensors of the base models, each after its component, such as `unet.conv_in.weight`.
/// Files for SDXL and Flux mostly have the layers of the original release: then the names are those of its checkpoint,
/// such as `unet.model.diffusion_model.input_blocks.0.0.weight`.
///
/// # Errors
/// If none or several of the models' layers have a flattened name. The error has it.
pub fn with_paths(weights: &LoraWeights, names: &[impl AsRef<str>]) -> Result<LoraWeights> {
    let modules = Modules::new(names);
    let mut layers = BTreeMap::new();
    for (flat, layer) in weights.layers() {
        let wrong = |reason| Error::tensor(format!("{flat}.lora_down.weight"), reason);
        let path = modules.find(flat).map_err(wrong)?.to_owned();
        if layers.insert(path.clone(), layer.clone()).is_some() {
            return Err(wrong(format!("another layer of the file is {path:?} too")));
        }
    }
    Ok(LoraWeights { layers, ..weights.clone() })
}

fn parse(key: &str) -> Result<(&str, Role)> {
    let (flat, last) = key.split_once('.').unwrap_or((key, ""));
    let role = match last {
        "lora_down.weight" => Role::A,
        "lora_up.weight" => Role::B,
        "alpha" => Role::Alpha,
        _ => {
            let reason = "it is neither lora_down, lora_up nor alpha of a layer";
            return Err(Error::tensor(key, origin(key).unwrap_or(reason)));
        }
    };
    Ok((flat, role))
}

/// Writes an adapter, whose names begin with the component, as [`load`] gives them. Factors keep their bits,
/// and each layer has its own alpha. The options `rslora` and `lora_dropout` are not in the file: a scaling by
/// √r becomes an alpha of the same value.
///
/// The names are those that sd-scripts has for the model: `text_encoder.` becomes `lora_te_` for Stable Diffusion 1 and
/// 2, `lora_te1_` for others, and T5 `lora_te3_`. A `transformer.` with diffusers' layers becomes
/// `lora_transformer_`, which diffusers and ComfyUI read for Flux, one with those of the original release `lora_unet_`.
///
/// The file appears complete and flushed to disk, or not at all. Equal contents give equal bytes.
///
/// # Errors
/// If the adapter has something other than factors; if a name has no component, or two layers have one
/// flattened name; if a layer is an embedding, a convolution of other than two dimensions or of several
/// groups, or has `fan_in_fan_out` or the scaling 0; if a value is not finite; and if the file system refuses.
pub fn save(path: impl AsRef<Path>, weights: &LoraWeights) -> Result<()> {
    let path = path.as_ref();
    let save = || {
        let weights = &*weights.joined()?;
        let layers = layers(weights, "kohya's format", false)?;
        let names = Names::new(layers.iter().map(|(path, ..)| *path));
        let mut file = StateDict::new();
        for (path, layer, factors) in layers {
            let name = Part::A.at(path);
            let kind = layer.kind.as_ref().unwrap_or(&LayerKind::Linear);
            let flat = check_kind(kind).and_then(|()| names.flattened(path));
            let flat = flat.map_err(|reason| Error::tensor(&name, reason))?;
            let factors = factors.without_rslora(weights.options.lora.rslora);
            let alpha = alpha_tensor(factors.lora_alpha).map_err(|e| Error::tensor(&name, e))?;
            let parts =
                [("lora_down.weight", factors.a), ("lora_up.weight", factors.b), ("alpha", alpha)];
            for (last, tensor) in parts {
                if file.insert(format!("{flat}.{last}"), tensor).is_some() {
                    let reason = format!("another layer also has the flattened name {flat:?}");
                    return Err(Error::tensor(name, reason));
                }
            }
        }
        Ok(atomic_file::replace(path, &serialize(&file, None)?)?)
    };
    save().map_err(|e: Error| e.at(path))
}

fn check_kind(kind: &LayerKind) -> std::result::Result<(), String> {
    match kind {
        LayerKind::Conv2d { groups: 1 } => Ok(()),
        kind if kind.is_linear() => Ok(()),
        kind => Err(format!("kohya's format has no {kind:?}")),
    }
}

/// In F32 if that is exact.
fn alpha_tensor(alpha: f64) -> candle_core::Result<Tensor> {
    if alpha == 0. {
        candle_core::bail!("its alpha is 0, which kohya's format takes as r")
    }
    match alpha as f32 {
        short if f64::from(short) == alpha => Tensor::new(short, &Device::Cpu),
        _ => Tensor::new(alpha, &Device::Cpu),
    }
}
