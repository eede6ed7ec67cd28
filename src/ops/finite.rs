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
            product_sum(&t)? == 0.
        }
    })
}

/// The sum of 0 times each value: NaN where one is not finite. Rows are summed first, because a device sums a whole
/// tensor in one thread block.
fn product_sum(t: &Tensor) -> Result<f32> {
    let t = (t.flatten_all()? * 0.)?;
    let rows = t.elem_count().isqrt();
    let columns = t.elem_count() / rows;
    let mut sum = t.narrow(0, 0, rows * columns)?.reshape((rows, columns))?.sum(1)?.sum_all()?;
    let rest = t.elem_count() - rows * columns;
    if rest > 0 {
        sum = (sum + t.narrow(0, rows * columns, rest)?.sum_all()?)?;
    }
    sum.to_dtype(DType::F32)?.to_scalar()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// The computation for devices, on the CPU.
    #[test]
    fn the_sum_of_products_sees_every_value() -> Result<()> {
        for len in [1, 2, 3, 4, 8, 11, 12] {
            let finite = vec![1e30f32; len];
            assert_eq!(product_sum(&Tensor::new(finite.clone(), &Device::Cpu)?)?, 0.);
            for i in 0..len {
                let mut values = finite.clone();
                values[i] = f32::INFINITY;
                assert!(product_sum(&Tensor::new(values, &Device::Cpu)?)?.is_nan());
            }
        }
        Ok(())
    }
}
