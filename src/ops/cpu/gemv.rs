//! The product of one row or a few with a quantised weight, as in generation: the weight is read once, and is not
//! decoded where its format has integers.

use super::buffer::filled;
use super::decode::{Blocks, Rows};
use super::rows::{sum, vectorized};
use crate::ops::matrix::Quantized;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Result};
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
    let (m, _) = l.shape().dims2()?;
    if m > FEW || !w.is_transposed() || x.dtype() == DType::F64 {
        return Ok(None);
    }
    let CpuStorage::F32(x) = x.to_dtype(l, DType::F32)? else { return Ok(None) };
    Ok(Some(CpuStorage::F32(few_rows(&x, &Blocks::new(w.blocks())?)?)))
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
    let rows = Rows::new(x, w);
    if let Some(rows) = &rows {
        let shares = y.par_chunks_mut(share * m).enumerate();
        shares.for_each(|(i, y)| rows.dot(w, i * share, y));
    }
    // Sums of integers overflow before those of values, and infinities of both signs meet in them.
    if rows.is_none() || y.iter().any(|y| !y.is_finite()) {
        decoded(x, w, &mut y, (step, share))?;
    }
    if m == 1 {
        return Ok(y);
    }
    Ok((0..m).flat_map(|row| y.iter().skip(row).step_by(m).copied()).collect())
}

/// The same by decoding `step` rows at a time, with a `share` of rows for each thread.
fn decoded(x: &[f32], w: &Blocks, y: &mut [f32], (step, share): (usize, usize)) -> Result<()> {
    let (k, m) = (w.columns, x.len() / w.columns);
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
            Ok(())
        },
    )
}
