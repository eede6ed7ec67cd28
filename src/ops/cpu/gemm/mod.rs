//! Matrix products by faer, whose micro-kernels use AVX-512 where the machine has it. candle's GEMM
//! uses it only if it was compiled for it. BF16 operands are multiplied by gemmkit where the machine has AVX512-BF16.

mod bf16;
mod in_parts;
mod lines;
mod schedule;
mod view;

use super::buffer::filled;
use candle_core::{CpuStorage, Layout, WithDType};
use faer::{Accum, MatMut};
use in_parts::half_precision;
use lines::Lines;
use schedule::parallel_gemm;

pub(in crate::ops) use in_parts::gemm_quantized;
pub(in crate::ops) use schedule::Real;
pub(in crate::ops) use view::FUSED_ATTENTION;
pub(super) use view::{gemm_view, View};

/// `a·b`, in F32 for half-precision operands that are upcast. `None` for other dtypes, and for layouts in which neither
/// rows nor columns are contiguous.
pub(in crate::ops) fn gemm(
    (a, al): (&CpuStorage, &Layout),
    (b, bl): (&CpuStorage, &Layout),
) -> Option<CpuStorage> {
    use CpuStorage::{BF16, F16, F32, F64};
    Some(match (a, b) {
        (F32(a), F32(b)) => F32(full_precision(Lines::new(a, al)?, Lines::new(b, bl)?)),
        (F64(a), F64(b)) => F64(full_precision(Lines::new(a, al)?, Lines::new(b, bl)?)),
        (F16(a), F16(b)) => F32(half_precision(Lines::new(a, al)?, Lines::new(b, bl)?)),
        (BF16(a), BF16(b)) if bf16::is_available() => {
            BF16(bf16::product(Lines::new(a, al)?, Lines::new(b, bl)?))
        }
        (BF16(a), BF16(b)) => F32(half_precision(Lines::new(a, al)?, Lines::new(b, bl)?)),
        _ => return None,
    })
}

/// `y = a·b`, or `y += a·b`, with operands of one dtype. Returns false and leaves `y` as it is for other
/// operands, and for layouts in which neither rows nor columns are contiguous.
pub(in crate::ops) fn gemm_into<T: WithDType + Real>(
    y: &mut [T],
    add: bool,
    (a, al): (&CpuStorage, &Layout),
    (b, bl): (&CpuStorage, &Layout),
) -> bool {
    let lines = |s, l| Some(Lines::new(T::cpu_storage_as_slice(s).ok()?, l)?.matrix());
    let (Some(a), Some(b)) = (lines(a, al), lines(b, bl)) else { return false };
    if a.ncols() != b.nrows() || y.len() != a.nrows() * b.ncols() {
        return false;
    }
    if !add && a.ncols() == 0 {
        y.fill(T::zero());
    }
    let accum = if add { Accum::Add } else { Accum::Replace };
    let out = MatMut::from_row_major_slice_mut(y, a.nrows(), b.ncols());
    parallel_gemm(out, accum, a, b, rayon::current_num_threads());
    true
}

fn full_precision<T: Real>(a: Lines<T>, b: Lines<T>) -> Vec<T> {
    let (a, b) = (a.matrix(), b.matrix());
    let mut y = filled(T::zero_impl(), a.nrows() * b.ncols());
    let out = MatMut::from_row_major_slice_mut(&mut y, a.nrows(), b.ncols());
    parallel_gemm(out, Accum::Replace, a, b, rayon::current_num_threads());
    y
}

#[cfg(test)]
mod tests;
