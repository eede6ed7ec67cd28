//! Detects NaN and infinite values.

use candle_core::{CpuStorage, DType, Result, Storage, Tensor, WithDType};
use rayon::prelude::*;

/// Whether every value of `t` is finite. On a device, one number is copied to the host.
pub(crate) fn is_finite(t: &Tensor) -> Result<bool> {
    fn all<T: WithDType>(t: &[T]) -> bool {
        // No early exit within a block, so that the compiler vectorizes the loop.
        let block = |t: &[T]| t.iter().fold(true, |all, v| all & v.to_f64().is_finite());
        t.par_chunks(1 << 16).all(block)
    }
    if t.elem_count() == 0 {
        return Ok(true);
    }
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    Ok(match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => all(&v[range]),
        Storage::Cpu(CpuStorage::F64(v)) => all(&v[range]),
        Storage::Cpu(CpuStorage::BF16(v)) => all(&v[range]),
        Storage::Cpu(CpuStorage::F16(v)) => all(&v[range]),
        _ => {
            drop(storage);
            // The product is NaN where a value is not finite. Rows are summed first, because a
            // device sums a whole tensor in one thread block.
            let rows = t.dims().first().map_or(1, |n| *n);
            let sum = (&t * 0.)?.reshape((rows, ()))?.sum(1)?.sum_all()?;
            sum.to_dtype(DType::F32)?.to_scalar::<f32>()? == 0.
        }
    })
}
