//! An operand of a matrix product as it lies in memory.

use candle_core::Layout;
use faer::MatRef;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// The least number of values that a thread upcasts.
const UPCAST_PER_THREAD: usize = 1 << 14;

/// A matrix as lines of contiguous values: its rows, or with `columns` its columns.
#[derive(Clone, Copy)]
pub(super) struct Lines<'a, T> {
    values: &'a [T],
    pub count: usize,
    pub len: usize,
    stride: usize,
    pub columns: bool,
}

impl<'a, T: Copy> Lines<'a, T> {
    pub fn new(values: &'a [T], layout: &Layout) -> Option<Self> {
        let (rows, cols) = layout.shape().dims2().ok()?;
        let values = values.get(layout.start_offset()..)?;
        let lines = |count, len, stride, columns| Self { values, count, len, stride, columns };
        match *layout.stride() {
            [stride, 1] if stride >= cols => Some(lines(rows, cols, stride, false)),
            [1, stride] if stride >= rows => Some(lines(cols, rows, stride, true)),
            _ => None,
        }
    }

    pub fn part(self, from: usize, count: usize) -> Self {
        Self { values: &self.values[from * self.stride..], count, ..self }
    }

    pub fn matrix(self) -> MatRef<'a, T> {
        let Self { values, count, len, stride, columns } = self;
        let m = MatRef::from_row_major_slice_with_stride(values, count, len, stride);
        if columns {
            m.transpose()
        } else {
            m
        }
    }

    /// The same for gemmkit.
    pub fn view(self) -> gemmkit::MatRef<'a, T> {
        let Self { values, count, len, stride, columns } = self;
        let stride = stride as isize;
        if columns {
            gemmkit::MatRef::new(values, len, count, 1, stride)
        } else {
            gemmkit::MatRef::new(values, count, len, stride, 1)
        }
    }

    /// The same matrix in F32, stored in `buffer`.
    pub fn upcast(self, buffer: &mut Vec<f32>) -> Lines<'_, f32>
    where
        T: Sync,
        [T]: HalfFloatSliceExt,
    {
        let Self { values, count, len, stride, columns } = self;
        buffer.resize(count * len, 0.);
        buffer
            .par_chunks_mut(len.max(1))
            .zip(values.par_chunks(stride.max(1)))
            .with_min_len(UPCAST_PER_THREAD / len.max(1) + 1)
            .for_each(|(upcast, line)| line[..len].convert_to_f32_slice(upcast));
        Lines { values: buffer, count, len, stride: len, columns }
    }
}
