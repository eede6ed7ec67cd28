//! A merged tensor in a file's dtype, and what the rounding leaves of its update.

use crate::ops::is_finite;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{bail, Device, Result, Tensor};

/// The bytes of `after`, and the share of `after - before` that they keep: 1 if there is no difference.
pub(super) fn rounded(before: &Tensor, after: &Tensor, dtype: GgmlDType) -> Result<(Vec<u8>, f64)> {
    let blocks = QTensor::quantize(after, dtype)?;
    let stored = blocks.dequantize(&Device::Cpu)?;
    if !is_finite(&stored)? {
        bail!("a merged value does not fit {dtype:?}")
    }
    let update = (after - before)?;
    let squares = dot(&update, &update)?;
    let share = if squares == 0. { 1. } else { dot(&(stored - before)?, &update)? / squares };
    Ok((blocks.data()?.into_owned(), share))
}

/// The sum of the products. Each row is summed in F32, the rows in F64.
fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    let rows = (a * b)?.sum(a.rank() - 1)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(rows.into_iter().map(f64::from).sum())
}
