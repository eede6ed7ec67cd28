//! Layers on their way between an adapter and the formats that have PEFT's shapes, one pair of factors a layer.

use super::shapes::{kind, layer_from_peft, to_peft};
use crate::layers::Part;
use crate::weights::{AdapterConfig, Factors, LayerWeights, LoraWeights};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// The tensors of a file by layer, with their keys.
#[derive(Default)]
pub(super) struct Pairs(BTreeMap<String, Pair>);

#[derive(Default)]
struct Pair {
    a: Option<(String, Tensor)>,
    b: Option<(String, Tensor)>,
    alpha: Option<(String, Tensor)>,
}

/// What a tensor of a file is in its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    A,
    B,
    Alpha,
}

impl Pairs {
    pub fn insert(&mut self, path: String, role: Role, key: String, tensor: Tensor) -> Result<()> {
        let pair = self.0.entry(path).or_default();
        let place = match role {
            Role::A => &mut pair.a,
            Role::B => &mut pair.b,
            Role::Alpha => &mut pair.alpha,
        };
        if let Some((other, _)) = place {
            return Err(Error::tensor(key, format!("it is the same tensor as {other:?}")));
        }
        *place = Some((key, tensor));
        Ok(())
    }

    /// The layers in the order of their paths. An error if one lacks a factor.
    pub fn into_layers(self) -> Result<Vec<FileLayer>> {
        if self.0.is_empty() {
            return Err(Error::Invalid("it has no factors of LoRA".to_owned()));
        }
        self.0.into_iter().map(|(path, pair)| FileLayer::new(path, pair)).collect()
    }
}

/// A layer that was read.
pub(super) struct FileLayer {
    pub path: String,
    /// The key of `a` in the file.
    pub key: String,
    pub a: Tensor,
    pub b: Tensor,
    /// `lora_alpha`; `None` for r, without `rslora`.
    pub alpha: Option<f64>,
    pub embedding: bool,
}

impl FileLayer {
    fn new(path: String, Pair { a, b, alpha }: Pair) -> Result<Self> {
        let key = [&a, &b, &alpha].into_iter().flatten().map(|(key, _)| key.clone()).next();
        let (Some((key, a)), Some((b_key, b))) = (a, b) else {
            let reason = "its layer lacks one of the two factors";
            return Err(Error::tensor(key.unwrap_or(path), reason));
        };
        for (key, factor) in [(&key, &a), (&b_key, &b)] {
            if !factor.dtype().is_float() {
                return Err(Error::tensor(key, format!("it holds {:?}", factor.dtype())));
            }
        }
        let scalar = |(key, alpha)| scalar(&alpha).map_err(|e| Error::tensor(key, e));
        let alpha = alpha.map(scalar).transpose()?;
        Ok(Self { path, key, a, b, alpha, embedding: false })
    }

    fn weights(self, rslora: bool) -> Result<(String, LayerWeights)> {
        let Self { path, key, a, b, alpha, embedding } = self;
        let read = || {
            let (kind, r) = (kind([&a, &b], embedding, None).map_err(Error::Invalid)?, a.dim(0)?);
            let factors = Factors { a, b, r, lora_alpha: alpha.unwrap_or(r as f64) };
            Ok(layer_from_peft(kind, factors, rslora)?)
        };
        let layer = read().map_err(|e: Error| Error::tensor(key, e))?;
        Ok((path, layer))
    }
}

/// The value of a tensor with one, in any dtype.
fn scalar(t: &Tensor) -> candle_core::Result<f64> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.reshape(())?.to_scalar()
}

/// The adapter of these layers, with the other options of `config`.
pub(super) fn adapter(config: AdapterConfig, layers: Vec<FileLayer>) -> Result<LoraWeights> {
    if config.lora.use_dora {
        let reason = "the magnitudes of DoRA are read from PEFT's folders alone";
        return Err(Error::unsupported("the option use_dora = true", reason));
    }
    let layers = layers.into_iter().map(|layer| layer.weights(config.lora.rslora));
    let layers = layers.collect::<Result<_>>()?;
    LoraWeights::of_layers(config, layers)
}

/// The layers of an adapter by path, in PEFT's shapes. An error if it has something else, which `format` does not have,
/// or a linear layer with another `fan_in_fan_out` than the file's.
pub(super) fn layers<'a>(
    weights: &'a LoraWeights,
    format: &str,
    fan_in_fan_out: bool,
) -> Result<Vec<(&'a str, &'a LayerWeights, Factors)>> {
    weights.refuse_others(format, "merge it into the base by `merge_files`")?;
    let common = &weights.options.lora;
    let layer = |(path, layer): (&'a str, &'a LayerWeights)| {
        let cfg = layer.options(common);
        let linear = layer.kind.as_ref().is_none_or(|kind| kind.is_linear());
        if linear && cfg.fan_in_fan_out != fan_in_fan_out {
            let own = cfg.fan_in_fan_out;
            let reason = format!(
                "its fan_in_fan_out is {own}, and {format} cannot say it: save it in this crate's format, or \
                 set {fan_in_fan_out}, if the weight is so in the program that will read the file"
            );
            return Err(Error::tensor(Part::A.at(path), reason));
        }
        let factors = cfg.validate(layer.a.dtype()).and_then(|()| to_peft(layer, common.rslora));
        Ok((path, layer, factors.map_err(|e| Error::tensor(Part::A.at(path), e))?))
    };
    weights.layers().map(layer).collect()
}
