//! The interface of `gemm/` in builds without faer: every product is candle's.

use super::buffer::filled;
use super::decode::Blocks;
use crate::ops::backend::candle_gemm;
use crate::ops::matrix::Quantized;
use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{CpuStorage, DType, Layout, Result};

type Operand<'a> = (&'a CpuStorage, &'a Layout);

pub(in crate::ops) trait Real {}
impl<T> Real for T {}

pub(in crate::ops) fn gemm(_: Operand, _: Operand) -> Option<CpuStorage> {
    None
}

/// Values of a quantised weight that are decoded at a time.
const DECODED: usize = if cfg!(test) { 1 << 11 } else { 1 << 20 };

/// `a·b` in F32, with the weight decoded in parts. `None` for F64.
pub(in crate::ops) fn gemm_quantized(
    (a, al): Operand,
    b: &Quantized,
) -> Result<Option<CpuStorage>> {
    if a.dtype() == DType::F64 {
        return Ok(None);
    }
    let (m, k) = al.shape().dims2()?;
    let a = a.to_dtype(al, DType::F32)?;
    let (b, columns) = (Blocks::new(b.blocks())?, b.is_transposed());
    let n = if columns { b.rows } else { b.columns };
    let (al, yl) = (Layout::contiguous((m, k)), Layout::contiguous((m, n)));
    let mut y = CpuStorage::F32(filled(0., m * n));
    let step = (DECODED / b.columns.max(1)).max(1);
    for from in (0..b.rows).step_by(step) {
        let count = step.min(b.rows - from);
        let mut part = filled(0., count * b.columns);
        b.decode_in_parallel(from, &mut part)?;
        let (part, layout) = (CpuStorage::F32(part), Layout::contiguous((count, b.columns)));
        if columns {
            let product = candle_gemm(&a, &al, &part, &layout.transpose(0, 1)?)?;
            product.copy2d(&mut y, m, count, count, n, 0, from)?;
        } else {
            // Not every GEMM takes rows with gaps.
            let mut rows = CpuStorage::F32(filled(0., m * count));
            a.copy2d(&mut rows, m, count, k, count, from, 0)?;
            let product = candle_gemm(&rows, &Layout::contiguous((m, count)), &part, &layout)?;
            y = y.binary_impl::<Add>(&product, &yl, &yl)?;
        }
    }
    Ok(Some(y))
}

pub(in crate::ops) fn gemm_into<T>(_: &mut [T], _: bool, _: Operand, _: Operand) -> bool {
    false
}

/// Attention is composed of candle's operations.
pub(in crate::ops) const FUSED_ATTENTION: bool = false;

pub(super) fn gemm_view<T>(
    _: (&mut [T], View),
    _: bool,
    _: (&[T], View),
    _: (&[T], View),
    _: f32,
) -> bool {
    false
}

#[derive(Clone, Copy)]
pub(super) struct View;

impl View {
    pub fn new(_: usize, _: usize, _: usize, _: usize) -> Self {
        Self
    }

    pub fn t(self) -> Self {
        self
    }
}
