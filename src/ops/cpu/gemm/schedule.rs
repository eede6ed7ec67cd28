//! How `y = a·b` is split into calls of faer's single-threaded GEMM: over threads, columns and k.

use super::vzeroupper::vzeroupper;
use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, MatMut, MatRef, Par};

/// A scalar of faer's GEMM.
pub(in crate::ops) trait Real: RealField + Copy {}
impl<T: RealField + Copy> Real for T {}

/// Multiplications below which one thread is faster than two.
const PARALLEL_MIN_FLOPS: usize = if cfg!(test) { 1 << 10 } else { 1 << 20 };

/// Columns that faer's kernels, which take 96, 48, 24 or 12 at a time, compute without a remainder.
const NC: usize = if cfg!(test) { 24 } else { 192 };

/// Products summed at a time: of more, faer 0.24 gives its kernels fewer columns than they can take,
/// where it does not know the caches and assumes 256 KiB.
const KC: usize = if cfg!(test) { 48 } else { 384 };

/// Rows of `y` that count as few, if there are four times as many products to sum: a result by columns
/// that is transposed then costs less than the packing of `b` which faer needs for one by rows.
const FEW_ROWS: usize = 256;

/// Values of `b` from which that is so: more than a core's cache holds.
const LARGE_WEIGHT: usize = if cfg!(test) { 1 << 9 } else { 1 << 20 };

/// Columns of such a result at a time.
const FEW_ROWS_NC: usize = if cfg!(test) { 24 } else { 512 };

/// `y = a·b`, or `y += a·b`, with the longer side of `y` halved until each thread has a part.
pub(super) fn parallel_gemm<T: Real>(
    y: MatMut<T>,
    accum: Accum,
    a: MatRef<T>,
    b: MatRef<T>,
    threads: usize,
) {
    let (m, n) = y.shape();
    if threads < 2
        || m.max(n) < 2
        || m.saturating_mul(n).saturating_mul(a.ncols()) < PARALLEL_MIN_FLOPS
    {
        return single_threaded(y, accum, a, b);
    }
    let first = threads / 2;
    // In whole vectors where there are enough.
    let part = |len: usize| match len * first / threads {
        part if part < 16 => part.max(1),
        part => part / 16 * 16,
    };
    if m < n {
        let ((y1, y2), (b1, b2)) = (y.split_at_col_mut(part(n)), b.split_at_col(part(n)));
        both(
            || parallel_gemm(y1, accum, a, b1, first),
            || parallel_gemm(y2, accum, a, b2, threads - first),
        );
    } else {
        let ((y1, y2), (a1, a2)) = (y.split_at_row_mut(part(m)), a.split_at_row(part(m)));
        both(
            || parallel_gemm(y1, accum, a1, b, first),
            || parallel_gemm(y2, accum, a2, b, threads - first),
        );
    }
}

/// In this thread, in the way that suits faer's kernels. `y` is to be zeros where there is nothing to
/// sum.
fn single_threaded<T: Real>(y: MatMut<T>, accum: Accum, a: MatRef<T>, b: MatRef<T>) {
    let (depth, n) = b.shape();
    match y.nrows() {
        // faer has another way with a single row, which reads `b` once in any case.
        1 => faer_gemm(y, accum, a, b),
        rows if rows <= FEW_ROWS.min(depth / 4)
            && depth * n >= LARGE_WEIGHT
            && b.row_stride() == 1 =>
        {
            few_rows(y, accum, a, b)
        }
        _ => blocked(y, accum, a, b, NC),
    }
}

/// Part after part by columns, which are transposed into `y`.
fn few_rows<T: Real>(mut y: MatMut<T>, accum: Accum, a: MatRef<T>, b: MatRef<T>) {
    let (rows, n) = y.shape();
    let mut part = vec![T::zero_impl(); rows * FEW_ROWS_NC.min(n)];
    for from in (0..n).step_by(FEW_ROWS_NC) {
        let width = FEW_ROWS_NC.min(n - from);
        let mut y = y.as_mut().subcols_mut(from, width);
        let mut part = MatMut::from_column_major_slice_mut(&mut part[..rows * width], rows, width);
        if let Accum::Add = accum {
            part.copy_from(&y);
        }
        blocked(part.as_mut(), accum, a, b.subcols(from, width), width);
        y.copy_from(part);
    }
}

/// As many products at a time as suits faer's kernels, for `strip` columns of `y` after the other.
fn blocked<T: Real>(mut y: MatMut<T>, accum: Accum, a: MatRef<T>, b: MatRef<T>, strip: usize) {
    let (n, depth) = (y.ncols(), a.ncols());
    let step = depth.div_ceil(depth.div_ceil(KC).max(1)).max(1);
    for from in (0..depth).step_by(step) {
        let step = step.min(depth - from);
        let (a, b) = (a.subcols(from, step), b.subrows(from, step));
        let accum = if from == 0 { accum } else { Accum::Add };
        for from in (0..n).step_by(strip) {
            let width = strip.min(n - from);
            let (y, b) = (y.as_mut().subcols_mut(from, width), b.subcols(from, width));
            faer_gemm(y, accum, a, b);
        }
    }
}

fn faer_gemm<T: Real>(y: MatMut<T>, accum: Accum, a: MatRef<T>, b: MatRef<T>) {
    single_gemm(y, accum, a, b, T::one_impl());
}

/// `y = scale·a·b`, or `y += scale·a·b`, by one call of faer.
pub(super) fn single_gemm<T: Real>(
    y: MatMut<T>,
    accum: Accum,
    a: MatRef<T>,
    b: MatRef<T>,
    scale: T,
) {
    matmul(y, accum, a, b, scale, Par::Seq);
    vzeroupper();
}

/// As `rayon::join`, which hands over both and sleeps where the caller is no thread of rayon's; here
/// the caller always takes the first.
fn both(here: impl FnOnce() + Send, there: impl FnOnce() + Send) {
    rayon::in_place_scope(|scope| {
        scope.spawn(|_| there());
        here();
    });
}

#[cfg(test)]
mod tests {
    use super::super::tests::whole;
    use super::*;
    use candle_core::{Result, Tensor};

    #[test]
    fn any_number_of_threads_gives_the_same_sums() -> Result<()> {
        let sizes = [
            (1, 300, 40),
            (40, 300, 1),
            (1, 2000, 1),
            (17, 50, 33),
            (12, 300, 100),
            (1100, 600, 90),
        ];
        for (m, k, n) in sizes {
            let (a, b) = (whole(m, k)?, whole(k, n)?);
            let expected = a.matmul(&b)?.flatten_all()?.to_vec1::<f32>()?;
            let values = |m: &Tensor| m.flatten_all()?.to_vec1::<f32>();
            let (a, rows, columns) = (values(&a)?, values(&b)?, values(&b.t()?)?);
            let a = MatRef::from_row_major_slice(&a, m, k);
            let rows = MatRef::from_row_major_slice(&rows, k, n);
            let columns = MatRef::from_column_major_slice(&columns, k, n);
            for (b, threads) in [1, 2, 3, 8, 64].into_iter().flat_map(|t| [(rows, t), (columns, t)])
            {
                let mut y = vec![f32::NAN; m * n];
                for (accum, times) in [(Accum::Replace, 1.), (Accum::Add, 2.)] {
                    parallel_gemm(
                        MatMut::from_row_major_slice_mut(&mut y, m, n),
                        accum,
                        a,
                        b,
                        threads,
                    );
                    let right = y.iter().zip(&expected).all(|(y, once)| *y == times * once);
                    assert!(right, "{m} x {k} x {n} in {threads} threads, {accum:?}");
                }
            }
        }
        Ok(())
    }
}
