//! Two factors during a conversion.

use candle_core::{DType, Device, Result, Tensor};

/// Two factors and their rank.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub a: Tensor,
    pub b: Tensor,
    pub r: usize,
}

/// Whether every value is zero.
pub(crate) fn is_zero(t: &Tensor) -> Result<bool> {
    let t = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
    Ok(t.elem_count() == 0 || t.abs()?.max(0)?.to_scalar::<f64>()? == 0.)
}
