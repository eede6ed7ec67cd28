//! The factors of a layer during a conversion.

use crate::layers::{same_scaling, LoraConfig};
use candle_core::{DType, Device, Result, Tensor};

/// The factors of a layer and its rank.
#[derive(Debug, Clone)]
pub(crate) struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    pub r: usize,
}

/// The `lora_alpha` that gives a layer's scaling with the rank `to` and without `rslora`.
pub(crate) fn plain_alpha(cfg: &LoraConfig, to: usize) -> f64 {
    match cfg.rslora {
        true => cfg.scaling() * to as f64,
        false => same_scaling(cfg.lora_alpha, cfg.r, to, false),
    }
}

/// Whether every value is zero.
pub(super) fn is_zero(t: &Tensor) -> Result<bool> {
    let t = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
    Ok(t.elem_count() == 0 || t.abs()?.max(0)?.to_scalar::<f64>()? == 0.)
}
