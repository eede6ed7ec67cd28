//! Matrix products by faer, whose micro-kernels use AVX-512 where the machine has it. candle's GEMM
//! uses it only if it was compiled for it.

mod schedule;
mod vzeroupper;

use super::buffer::filled;
use super::decode::Blocks;
use crate::ops::matrix::Quantized;
use candle_core::{CpuStorage, Layout, Result, WithDType};
use faer::{Accum, MatMut, MatRef};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use schedule::{parallel_gemm, single_gemm};

pub(in crate::ops) use schedule::Real;

/// Values of a half-precision weight that are upcast at a time.
const UPCAST: usize = if cfg!(test) { 1 << 11 } else { 1 << 22 };

/// Values of a quantised weight that are decoded at a time.
const DECODED: usize = if cfg!(test) { 1 << 11 } else { 1 << 18 };

/// The least number of values that a thread upcasts.
const UPCAST_PER_THREAD: usize = 1 << 14;

/// `a·b`, in F32 for half-precision operands. `None` for other dtypes, and for layouts in which neither
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

/// `b`, the weight, is upcast in parts.
fn half_precision<T: Copy + Sync>(a: Lines<T>, b: Lines<T>) -> Vec<f32>
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

/// A matrix as lines of contiguous values: its rows, or with `columns` its columns.
#[derive(Clone, Copy)]
struct Lines<'a, T> {
    values: &'a [T],
    count: usize,
    len: usize,
    stride: usize,
    columns: bool,
}

impl<'a, T: Copy> Lines<'a, T> {
    fn new(values: &'a [T], layout: &Layout) -> Option<Self> {
        let (rows, cols) = layout.shape().dims2().ok()?;
        let values = values.get(layout.start_offset()..)?;
        let lines = |count, len, stride, columns| Self { values, count, len, stride, columns };
        match *layout.stride() {
            [stride, 1] if stride >= cols => Some(lines(rows, cols, stride, false)),
            [1, stride] if stride >= rows => Some(lines(cols, rows, stride, true)),
            _ => None,
        }
    }

    fn part(self, from: usize, count: usize) -> Self {
        Self { values: &self.values[from * self.stride..], count, ..self }
    }

    fn matrix(self) -> MatRef<'a, T> {
        let Self { values, count, len, stride, columns } = self;
        let m = MatRef::from_row_major_slice_with_stride(values, count, len, stride);
        if columns {
            m.transpose()
        } else {
            m
        }
    }

    /// The same matrix in F32, stored in `buffer`.
    fn upcast(self, buffer: &mut Vec<f32>) -> Lines<'_, f32>
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

/// Whether [`gemm_view`] is available.
pub(in crate::ops) const FUSED_ATTENTION: bool = true;

/// `y = scale·a·b` or, with `add`, `y += scale·a·b`, in this thread. Returns false and leaves `y` as it is if
/// it is not available.
pub(super) fn gemm_view<T: Real>(
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
pub(super) struct View {
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
}

impl View {
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Result, Storage, Tensor};

    fn gemm_of(a: &Tensor, b: &Tensor) -> Option<CpuStorage> {
        let ((a, al), (b, bl)) = (a.storage_and_layout(), b.storage_and_layout());
        match (&*a, &*b) {
            (Storage::Cpu(a), Storage::Cpu(b)) => gemm((a, al), (b, bl)),
            _ => None,
        }
    }

    /// Whole numbers, whose sums are exact in any order.
    pub(super) fn whole(rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::rand(-4f32, 4., (rows, cols), &Device::Cpu)?.round()
    }

    /// The same matrix with its rows contiguous, its columns, and either with gaps between.
    fn layouts(m: &Tensor) -> Result<Vec<Tensor>> {
        let (rows, cols) = m.dims2()?;
        let gaps = m.pad_with_zeros(0, 2, 3)?.pad_with_zeros(1, 1, 5)?;
        let by_columns = |m: &Tensor| m.t()?.contiguous()?.t();
        let part = |m: Tensor| m.narrow(0, 2, rows)?.narrow(1, 1, cols);
        // The last line of these ends where the storage does.
        let last = m.pad_with_zeros(0, 2, 0)?.pad_with_zeros(1, 1, 0)?;
        Ok(vec![
            m.clone(),
            by_columns(m)?,
            part(by_columns(&gaps)?)?,
            part(gaps)?,
            part(by_columns(&last)?)?,
            part(last)?,
        ])
    }

    #[test]
    fn every_layout_and_dtype_gives_candle_s_product() -> Result<()> {
        // One row, one column, low rank, few rows, and a weight that is upcast in several parts.
        let sizes =
            [(1, 7, 5), (9, 3, 1), (40, 200, 8), (9, 70, 150), (150, 90, 130), (90, 130, 150)];
        for (m, k, n) in sizes {
            let (a, b) = (whole(m, k)?, whole(k, n)?);
            let expected =
                a.to_dtype(DType::F64)?.matmul(&b.to_dtype(DType::F64)?)?.to_vec2::<f64>()?;
            for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
                for a in layouts(&a.to_dtype(dtype)?)? {
                    for b in layouts(&b.to_dtype(dtype)?)? {
                        let y = match gemm_of(&a, &b) {
                            Some(CpuStorage::F64(y)) => Tensor::new(y, &Device::Cpu)?,
                            Some(CpuStorage::F32(y)) => Tensor::new(y, &Device::Cpu)?,
                            y => panic!("{y:?}"),
                        };
                        let y = y.to_dtype(DType::F64)?.reshape((m, n))?.to_vec2::<f64>()?;
                        assert_eq!(y, expected, "{dtype:?} {:?} {:?}", a.layout(), b.layout());
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn into_a_slice_replaces_or_adds() -> Result<()> {
        for k in [70, 0] {
            let (a, b) = (whole(9, k)?, whole(k, 4)?);
            let ((sa, al), (sb, bl)) = (a.storage_and_layout(), b.storage_and_layout());
            let (Storage::Cpu(sa), Storage::Cpu(sb)) = (&*sa, &*sb) else { panic!() };
            let once = match k {
                0 => vec![0.; 36],
                _ => a.matmul(&b)?.flatten_all()?.to_vec1::<f32>()?,
            };
            let mut y = vec![f32::NAN; 36];
            for (add, times) in [(false, 1.), (true, 2.), (true, 3.), (false, 1.)] {
                assert!(gemm_into(&mut y, add, (sa, al), (sb, bl)));
                let expected: Vec<f32> = once.iter().map(|once| times * once).collect();
                assert_eq!(y, expected);
            }
            // Of another type, or size.
            assert!(!gemm_into(&mut [0f64; 36], true, (sa, al), (sb, bl)));
            assert!(!gemm_into(&mut y[1..], false, (sa, al), (sb, bl)));
            assert_eq!(y, once);
        }
        Ok(())
    }

    #[test]
    fn other_layouts_and_dtypes_are_left_to_candle() -> Result<()> {
        let (a, b) = (whole(4, 6)?, whole(6, 8)?);
        assert!(gemm_of(&a, &b.narrow(0, 0, 1)?.broadcast_as((6, 8))?).is_none());
        assert!(gemm_of(&a.to_dtype(DType::U8)?, &b.to_dtype(DType::U8)?).is_none());
        assert!(gemm_of(&a, &b.to_dtype(DType::F64)?).is_none());
        Ok(())
    }
}
