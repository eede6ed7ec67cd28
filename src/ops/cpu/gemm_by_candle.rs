//! The same door without faer: every product falls back to candle's.

use candle_core::{CpuStorage, Layout};

type Operand<'a> = (&'a CpuStorage, &'a Layout);

pub(in crate::ops) trait Real {}
impl<T> Real for T {}

pub(in crate::ops) fn gemm(_: Operand, _: Operand) -> Option<CpuStorage> {
    None
}

pub(in crate::ops) fn gemm_into<T>(_: &mut [T], _: bool, _: Operand, _: Operand) -> bool {
    false
}
