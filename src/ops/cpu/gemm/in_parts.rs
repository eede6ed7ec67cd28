//! Products with a weight that is converted to F32 in parts.

use super::lines::Lines;
use super::schedule::parallel_gemm;
use crate::ops::cpu::buffer::filled;
use crate::ops::cpu::decode::Blocks;
use crate::ops::matrix::Quantized;
use candle_core::{CpuStorage, Layout, Result};
use faer::{Accum, MatMut, MatRef};
use half::slice::HalfFloatSliceExt;

/// Values of a half-precision weight that are upcast at a time.
const UPCAST: usize = if cfg!(test) { 1 << 11 } else { 1 << 22 };

/// Values of a quantised weight that are decoded at a time.
const DECODED: usize = if cfg!(test) { 1 << 11 } else { 1 << 18 };

/// `b`, the weight, is upcast in parts.
pub(super) fn half_precision<T: Copy + Sync>(a: Lines<T>, b: Lines<T>) -> Vec<f32>
where
    [T]: HalfFloatSliceExt,
{
    let (mut a32, mut b32) = (vec![], vec![]);
    let a = a.upcast(&mut a32).matrix();
    let n = if b.columns { b.count } else { b.len };
    let mut y = filled(0., a.nrows() * n);
    let out = MatMut::from_row_major_slice_mut(&mut y, a.nrows(), n);
    let mut product = Product { out, a, columns: b.columns };
    for (from, count) in parts(b.count, UPCAST / b.len.max(1)) {
        product.add_part(from, b.part(from, count).upcast(&mut b32).matrix());
    }
    y
}

/// `a·b` in F32, with the weight decoded in parts. `None` for other dtypes of `a`, and for layouts in which
/// neither rows nor columns are contiguous.
pub(in crate::ops) fn gemm_quantized(
    (a, al): (&CpuStorage, &Layout),
    b: &Quantized,
) -> Result<Option<CpuStorage>> {
    let mut buffer = vec![];
    let a = match a {
        CpuStorage::F32(a) => Lines::new(a, al),
        CpuStorage::F16(a) => Lines::new(a, al).map(|a| a.upcast(&mut buffer)),
        CpuStorage::BF16(a) => Lines::new(a, al).map(|a| a.upcast(&mut buffer)),
        _ => None,
    };
    let Some(a) = a else { return Ok(None) };
    let (a, b, columns) = (a.matrix(), Blocks::new(b.blocks())?, b.is_transposed());
    let n = if columns { b.rows } else { b.columns };
    let mut y = filled(0., a.nrows() * n);
    let out = MatMut::from_row_major_slice_mut(&mut y, a.nrows(), n);
    let mut product = Product { out, a, columns };
    let step = DECODED / b.columns.max(1);
    let mut decoded = filled(0., step.clamp(1, b.rows.max(1)) * b.columns);
    for (from, count) in parts(b.rows, step) {
        let decoded = &mut decoded[..count * b.columns];
        b.decode_in_parallel(from, decoded)?;
        let part = MatRef::from_row_major_slice(decoded, count, b.columns);
        product.add_part(from, if columns { part.transpose() } else { part });
    }
    Ok(Some(CpuStorage::F32(y)))
}

/// `0..count` in parts of at most `step`, each (from, count).
fn parts(count: usize, step: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = step.max(1);
    (0..count).step_by(step).map(move |from| (from, step.min(count - from)))
}

/// `out = a·b`, with `b` given in parts: of its columns, or else of its rows, the first part first.
struct Product<'a> {
    out: MatMut<'a, f32>,
    a: MatRef<'a, f32>,
    columns: bool,
}

impl Product<'_> {
    fn add_part(&mut self, from: usize, part: MatRef<f32>) {
        let threads = rayon::current_num_threads();
        let Self { out, a, columns } = self;
        if *columns {
            let out = out.as_mut().subcols_mut(from, part.ncols());
            parallel_gemm(out, Accum::Replace, *a, part, threads);
        } else {
            let accum = if from == 0 { Accum::Replace } else { Accum::Add };
            parallel_gemm(out.as_mut(), accum, a.subcols(from, part.nrows()), part, threads);
        }
    }
}
