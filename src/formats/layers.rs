//! The layers of an adapter with the factors that most formats have, which are PEFT's: (r, in) and (out, r),
//! or (r, in, k..) and (out, r, 1..) of a convolution.

use crate::layers::{same_scaling, LayerKind, LoraConfig};
use crate::peft::{from_peft, kind, plain_alpha, to_peft, with_layers, Factors};
use crate::utils::names::{is_factor, join, refuse_other_names};
use crate::utils::{factors, AdapterConfig, StateDict};
use crate::{Error, Result};
use candle_core::Tensor;

/// A layer that was read.
pub(super) struct Layer {
    pub path: String,
    /// The key of `a` in the file.
    pub key: String,
    pub a: Tensor,
    pub b: Tensor,
    /// `lora_alpha`; `None` for r, without `rslora`.
    pub alpha: Option<f64>,
    pub embedding: bool,
}

/// The layers in the crate's shapes, with the other options of `config`.
pub(super) fn adapter(
    config: AdapterConfig,
    layers: Vec<Layer>,
) -> Result<(AdapterConfig, StateDict)> {
    if config.lora.use_dora {
        let reason = "the magnitudes of DoRA are read from PEFT's folders alone";
        return Err(Error::unsupported("the option use_dora = true", reason));
    }
    let (mut own, mut tensors) = (vec![], StateDict::new());
    for Layer { path, key, a, b, alpha, embedding } in layers {
        let read = || {
            let kind = kind([&a, &b], embedding, None).map_err(Error::Invalid)?;
            let r = a.dim(0)?;
            Ok((from_peft(&kind, a, b)?, kind, r))
        };
        let (factors, kind, r) = read().map_err(|e: Error| Error::tensor(key, e))?;
        let alpha = alpha.unwrap_or(r as f64);
        let alpha = same_scaling(alpha, r, factors.r, config.lora.rslora);
        tensors.insert(join(&path, "lora_A"), factors.a);
        tensors.insert(join(&path, "lora_B"), factors.b);
        own.push((path, kind, factors.r, alpha));
    }
    Ok((with_layers(config, own), tensors))
}

/// A layer to write.
pub(super) struct Saved<'a> {
    pub path: &'a str,
    pub kind: &'a LayerKind,
    pub factors: Factors,
    cfg: LoraConfig,
}

impl Saved<'_> {
    /// `lora_alpha` for the rank of the factors, with the adapter's `rslora`.
    pub fn alpha(&self) -> f64 {
        same_scaling(self.cfg.lora_alpha, self.cfg.r, self.factors.r, self.cfg.rslora)
    }

    /// The `lora_alpha` that gives the layer's scaling without `rslora`.
    pub fn plain_alpha(&self) -> f64 {
        plain_alpha(&self.cfg, self.factors.r)
    }
}

/// The layers of an adapter. An error if it has something else, which `format` does not have, or a linear layer
/// with another `fan_in_fan_out` than the file's.
pub(super) fn layers<'a>(
    tensors: &'a StateDict,
    config: &'a AdapterConfig,
    format: &str,
    fan_in_fan_out: bool,
) -> Result<Vec<Saved<'a>>> {
    refuse_other_names(tensors.keys())?;
    if let Some(name) = tensors.keys().find(|name| !is_factor(name)) {
        let reason = format!("{format} has lora_A and lora_B alone: merge it into the base");
        return Err(Error::tensor(name, reason));
    }
    let mut layers = vec![];
    for (path, [a, b]) in factors(tensors, config)? {
        let kind = config.kind(path).unwrap_or(&LayerKind::Linear);
        let cfg = config.lora_config(path);
        if kind.is_linear() && cfg.fan_in_fan_out != fan_in_fan_out {
            let own = cfg.fan_in_fan_out;
            let reason = format!(
                "its fan_in_fan_out is {own}, and {format} cannot say it: save it in this crate's format, or \
                 set {fan_in_fan_out}, if the weight is so in the program that will read the file"
            );
            return Err(Error::tensor(join(path, "lora_A"), reason));
        }
        let convert = || {
            cfg.validate(a.dtype())?;
            to_peft(kind, Factors { a: a.clone(), b: b.clone(), r: cfg.r })
        };
        let factors = convert().map_err(|e| Error::tensor(join(path, "lora_A"), e))?;
        layers.push(Saved { path, kind, factors, cfg });
    }
    config.check_used(layers.iter().map(|layer| layer.path))?;
    match layers.is_empty() {
        true => Err(Error::Invalid("the adapter is empty: there is nothing to save".to_owned())),
        false => Ok(layers),
    }
}
