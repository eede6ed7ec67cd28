//! `y += u·v` of small rank k: plain loops, compiled for the widest vector instructions of the machine.

use candle_core::WithDType;
use pulp::{Arch, Simd, WithSimd};
use std::ops::{Add, AddAssign, Mul, Range};

/// A float that the loops compute with.
pub(super) trait Float:
    WithDType + Add<Output = Self> + Mul<Output = Self> + AddAssign
{
}
impl<T: WithDType + Add<Output = T> + Mul<Output = T> + AddAssign> Float for T {}

/// Values of `v` that the L1 cache holds beside a part of a row of `y`.
const TILE: usize = 1 << 12;

/// `y[.., cols] += u·v`, with `y` in rows of `n`, `u` in rows of `rank` and `v` in rows of `cols.len()`.
pub(super) fn add<T: Float>(
    y: &mut [T],
    n: usize,
    cols: Range<usize>,
    u: &[T],
    v: &[T],
    rank: usize,
) {
    if rank > 0 && !cols.is_empty() {
        Arch::new().dispatch(RankK { y, n, cols, u, v, rank });
    }
}

struct RankK<'a, T> {
    y: &'a mut [T],
    n: usize,
    cols: Range<usize>,
    u: &'a [T],
    v: &'a [T],
    rank: usize,
}

impl<T: Float> WithSimd for RankK<'_, T> {
    type Output = ();

    // Inlined, with all that it calls, into the function that is compiled for the instructions.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { y, n, cols, u, v, rank } = self;
        let stride = cols.len();
        for from in (0..stride).step_by((TILE / rank).max(1)) {
            let width = (TILE / rank).max(1).min(stride - from);
            let at = cols.start + from;
            for (y, u) in y.chunks_exact_mut(n).zip(u.chunks_exact(rank)) {
                add_row(&mut y[at..at + width], u, &v[from..], stride);
            }
        }
    }
}

/// `y += u·v` for one row of `y`, four rows of `v` (a stride apart) in each pass.
#[inline(always)]
fn add_row<T: Float>(y: &mut [T], u: &[T], v: &[T], stride: usize) {
    let n = y.len();
    let row = |k: usize| &v[k * stride..][..n];
    let (quads, rest) = u.as_chunks::<4>();
    for (q, &[u0, u1, u2, u3]) in quads.iter().enumerate() {
        let (v0, v1, v2, v3) = (row(4 * q), row(4 * q + 1), row(4 * q + 2), row(4 * q + 3));
        for j in 0..n {
            y[j] += (u0 * v0[j] + u1 * v1[j]) + (u2 * v2[j] + u3 * v3[j]);
        }
    }
    for (k, &u) in rest.iter().enumerate() {
        let v = row(4 * quads.len() + k);
        for j in 0..n {
            y[j] += u * v[j];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole numbers, whose sums are exact in any order.
    fn whole<T: From<i8>>(len: usize) -> Vec<T> {
        (0..len).map(|i| T::from((i * 7 % 11) as i8 - 5)).collect()
    }

    fn adds_to_the_columns_alone<T: Float + From<i8> + std::fmt::Debug>() {
        // Every width up to 100, so that any vector width meets whole vectors and a scalar tail; and
        // more columns than a tile has.
        let widths = (0..=100).chain([TILE + 3]);
        for (m, width) in [1, 3].into_iter().flat_map(|m| widths.clone().map(move |w| (m, w))) {
            let (n, cols, rank) = (width + 5, 3..3 + width, 1 + width % 9);
            let (y, u, v) = (whole::<T>(m * n), whole(m * rank), whole(rank * width));
            let mut expected = y.clone();
            for (i, k) in (0..m).flat_map(|i| (0..rank).map(move |k| (i, k))) {
                for (j, at) in cols.clone().enumerate() {
                    expected[i * n + at] += u[i * rank + k] * v[k * width + j];
                }
            }
            let mut sum = y;
            add(&mut sum, n, cols, &u, &v, rank);
            assert_eq!(sum, expected, "{m} x {width}, rank {rank}");
        }
    }

    #[test]
    fn adds_to_the_columns_alone_in_both_floats() {
        adds_to_the_columns_alone::<f32>();
        adds_to_the_columns_alone::<f64>();
    }
}
