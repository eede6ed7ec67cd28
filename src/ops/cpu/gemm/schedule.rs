//! How `y = a·b` is split into calls of faer's single-threaded GEMM: over threads, columns and k.

use faer::linalg::matmul::matmul;
use faer::traits::RealField;
use faer::{Accum, MatMut, MatRef, Par};
use pulp::core_arch::x86::Avx;

/// A scalar of faer's GEMM.
pub(in crate::ops) trait Real: RealField + Copy {}
impl<T: RealField + Copy> Real for T {}

/// The least number of multiplications for a second thread.
const PARALLEL_MIN: usize = if cfg!(test) { 1 << 10 } else { 1 << 20 };

/// Columns of `y` for each call of faer (BLAS's nc): a multiple of its micro-kernels' 96, 48, 24 and 12.
/// Without it a product takes up to 1.29 of the time.
const NC: usize = if cfg!(test) { 24 } else { 192 };

/// `y = a·b`, or `y += a·b`, with the longer side of `y` halved until each thread has a block.
pub(super) fn parallel_gemm<T: Real>(
    y: MatMut<T>,
    accum: Accum,
    a: MatRef<T>,
    b: MatRef<T>,
    threads: usize,
) {
    let (m, n) = y.shape();
    if threads < 2 || m.max(n) < 2 || m.saturating_mul(n).saturating_mul(a.ncols()) < PARALLEL_MIN {
        return single_threaded(y, accum, a, b);
    }
    let first = threads / 2;
    // Whole vectors, if there are enough.
    let share = |len: usize| match len * first / threads {
        share if share < 16 => share.max(1),
        share => share / 16 * 16,
    };
    if m < n {
        let ((y1, y2), (b1, b2)) = (y.split_at_col_mut(share(n)), b.split_at_col(share(n)));
        both(
            || parallel_gemm(y1, accum, a, b1, first),
            || parallel_gemm(y2, accum, a, b2, threads - first),
        );
    } else {
        let ((y1, y2), (a1, a2)) = (y.split_at_row_mut(share(m)), a.split_at_row(share(m)));
        both(
            || parallel_gemm(y1, accum, a1, b, first),
            || parallel_gemm(y2, accum, a2, b, threads - first),
        );
    }
}

/// In this thread, in strips of [`NC`] columns.
fn single_threaded<T: Real>(mut y: MatMut<T>, accum: Accum, a: MatRef<T>, b: MatRef<T>) {
    let n = y.ncols();
    // faer has another algorithm for a single row, which reads `b` once in any case.
    let strip = if y.nrows() == 1 { n.max(1) } else { NC };
    for from in (0..n).step_by(strip) {
        let width = strip.min(n - from);
        let (y, b) = (y.as_mut().subcols_mut(from, width), b.subcols(from, width));
        single_gemm(y, accum, a, b, T::one_impl());
    }
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

/// Zeroes the upper halves of this thread's vector registers, which faer's kernels leave in use. While they are in use, each SSE
/// instruction (of which most compiled code consists) merges into its destination's upper half, and so
/// depends on the last instruction that wrote that register.
fn vzeroupper() {
    if let Some(avx) = Avx::try_new() {
        avx._mm256_zeroupper();
    }
}

/// Like `rayon::join`, but the caller always executes the first: from a thread that is not rayon's, `join`
/// hands over both and sleeps.
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
