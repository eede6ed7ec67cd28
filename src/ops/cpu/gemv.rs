//! The product of one row or a few with a quantised weight, as in generation: each row of the weight is decoded
//! in a core's cache and multiplied there.

use super::buffer::filled;
use super::decode::Blocks;
use super::rows::{sum, vectorized};
use crate::ops::matrix::Quantized;
use candle_core::backend::BackendStorage;
use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result};
use rayon::prelude::*;

/// Up to this many rows it is faster than decoding parts of the weight for a GEMM.
const FEW: usize = 4;

/// Values that are decoded at a time.
const DECODED: usize = 1 << 12;

/// The least number of values of the weight for a thread.
const PER_THREAD: usize = 1 << 16;

/// `x·w`, in F32 or the dtype of `x`, if `w` is the transpose of the stored matrix and `x` has few rows and is
/// not F64.
pub(super) fn gemm_quantized(
    x: &CpuStorage,
    l: &Layout,
    w: &Quantized,
) -> Result<Option<CpuStorage>> {
    let (m, k) = l.shape().dims2()?;
    if m > FEW || !w.is_transposed() || x.dtype() == DType::F64 {
        return Ok(None);
    }
    let blocks = w.blocks();
    if m == 1 && w.in_evaluation() && l.is_contiguous() && faster_by_candle(blocks.dtype(), k) {
        return Ok(Some(blocks.cpu_fwd(x, l)?.0));
    }
    let CpuStorage::F32(x) = x.to_dtype(l, DType::F32)? else { return Ok(None) };
    Ok(Some(CpuStorage::F32(few_rows(&x, &Blocks::new(blocks)?)?)))
}

/// Whether candle has kernels on 8-bit integers for the product of one row with this format. Its others are scalar on
/// x86-64.
fn faster_by_candle(dtype: GgmlDType, k: usize) -> bool {
    use GgmlDType::{Q2K, Q3K, Q4K, Q4_0, Q5K, Q6K, Q8K, Q8_0};
    // Its kernels take two blocks at a time, and a debug build panics at an odd one.
    k.is_multiple_of(64) && matches!(dtype, Q4_0 | Q8_0 | Q2K | Q3K | Q4K | Q5K | Q6K | Q8K)
}

/// `x·Wᵀ`, with `x` the values of (m, columns), as (m, rows).
fn few_rows(x: &[f32], w: &Blocks) -> Result<Vec<f32>> {
    let (k, n) = (w.columns, w.rows);
    if k == 0 || n == 0 {
        return Ok(filled(0., x.len() / k.max(1) * n));
    }
    let m = x.len() / k;
    let (step, share) = ((DECODED / k).max(1), (PER_THREAD / k).max(1));
    // Transposed, so that each thread has its own outputs.
    let mut y = filled(0., m * n);
    y.par_chunks_mut(share * m).enumerate().try_for_each_init(
        || filled(0., step * k),
        |decoded, (i, y)| {
            for (j, y) in y.chunks_mut(step * m).enumerate() {
                let rows = &mut decoded[..y.len() / m * k];
                w.decode(i * share + j * step, rows)?;
                vectorized(
                    #[inline(always)]
                    || {
                        for (w, y) in rows.chunks_exact(k).zip(y.chunks_exact_mut(m)) {
                            for (x, y) in x.chunks_exact(k).zip(y) {
                                *y = sum(x, w, |x, w| x * w);
                            }
                        }
                    },
                );
            }
            Ok::<_, candle_core::Error>(())
        },
    )?;
    if m == 1 {
        return Ok(y);
    }
    Ok((0..m).flat_map(|row| y.iter().skip(row).step_by(m).copied()).collect())
}
