//! Products of matrices that lie in larger buffers, as attention's heads do.

use super::schedule::{single_gemm, Real};
use faer::{Accum, MatMut, MatRef};

/// Whether [`gemm_view`] is available.
pub(in crate::ops) const FUSED_ATTENTION: bool = true;

/// `y = scale·a·b` or, with `add`, `y += scale·a·b`, in this thread. Returns false and leaves `y` as it is if
/// it is not available.
pub(in crate::ops::cpu) fn gemm_view<T: Real>(
    (y, yv): (&mut [T], View),
    add: bool,
    (a, av): (&[T], View),
    (b, bv): (&[T], View),
    scale: f32,
) -> bool {
    let accum = if add { Accum::Add } else { Accum::Replace };
    // As a transpose: faer 0.24's constructor by rows confuses the strides.
    let View { offset, rows, cols, row_stride, .. } = yv;
    let y = &mut y[offset..];
    let y = MatMut::from_column_major_slice_with_stride_mut(y, cols, rows, row_stride);
    single_gemm(y.transpose_mut(), accum, av.of(a), bv.of(b), T::from_f64_impl(f64::from(scale)));
    true
}

/// A matrix in a larger row-major buffer, possibly transposed.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops::cpu) struct View {
    offset: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    transposed: bool,
}

impl View {
    pub fn new(offset: usize, rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { offset, rows, cols, row_stride, transposed: false }
    }

    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn of<T>(self, values: &[T]) -> MatRef<'_, T> {
        let Self { offset, rows, cols, row_stride, transposed } = self;
        let values = &values[offset..];
        let m = MatRef::from_row_major_slice_with_stride(values, rows, cols, row_stride);
        if transposed {
            m.transpose()
        } else {
            m
        }
    }
}
