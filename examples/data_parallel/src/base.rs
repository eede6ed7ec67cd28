//! The frozen base, the same on every rank: random weights from a seed.

use crate::model::{Decoder, Sizes};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use std::collections::HashMap;

/// The tensors of a new base.
pub fn tensors(sizes: Sizes, seed: u64) -> Result<HashMap<String, Tensor>> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    Decoder::new(sizes, loralib::base::seeded(vb, seed))?;
    let vars = vars.data().lock().map_err(|e| e.to_string())?;
    Ok(vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect())
}
