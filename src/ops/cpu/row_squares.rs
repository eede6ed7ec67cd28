//! The squares of the rows of `W + B·A`, which is never built: one pass over W, in all threads.

use super::rows::{f32_slices, vectorized};
use crate::ops::backend::Backend;
use candle_core::{CpuStorage, Device, Result, Tensor};
use rayon::prelude::*;

/// Rows that share what is read of A.
const ROWS: usize = 4;

/// Values of a row at a time.
const LANES: usize = 64;

/// The least number of values of W for a thread.
const PER_THREAD: usize = 1 << 16;

/// ‖w + b·A‖² of each row of `w` (out, in), or ‖w‖², with A (r, in) and B (out, r), contiguous F32 tensors on the
/// CPU.
pub(in crate::ops) fn row_squares(
    w: &Tensor,
    update: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    let (out, k) = w.dims2()?;
    let r = update.map_or(Ok(0), |(a, _)| a.dim(0))?;
    let (a, b) = update.unwrap_or((w, w));
    let guards = [w, a, b].map(Tensor::storage_and_layout);
    let [(w, wl), (a, al), (b, bl)] = &guards;
    let storages = [CpuStorage::of(w)?, CpuStorage::of(a)?, CpuStorage::of(b)?];
    let [w, a, b] = f32_slices([(storages[0], *wl), (storages[1], *al), (storages[2], *bl)])?;
    let mut squares = vec![0f32; out];
    let least = PER_THREAD.div_ceil(ROWS * k.max(1));
    squares.par_chunks_mut(ROWS).enumerate().with_min_len(least).for_each(|(i, squares)| {
        let rows = |from: usize, n: usize| {
            let from = i * ROWS + from;
            (&w[from * k..][..n * k], &b[from * r..][..n * r])
        };
        vectorized(
            #[inline(always)]
            || match squares.len() {
                ROWS => {
                    let (w, b) = rows(0, ROWS);
                    squares.copy_from_slice(&of_rows::<ROWS>(w, &a[..r * k], b, k));
                }
                _ => {
                    for (row, square) in squares.iter_mut().enumerate() {
                        let (w, b) = rows(row, 1);
                        [*square] = of_rows::<1>(w, &a[..r * k], b, k);
                    }
                }
            },
        );
    });
    Tensor::new(squares, &Device::Cpu)
}

/// Of the `N` rows of `w`, with those of `b`.
#[inline(always)]
fn of_rows<const N: usize>(w: &[f32], a: &[f32], b: &[f32], k: usize) -> [f32; N] {
    let (mut sums, mut rest) = ([[0.; LANES]; N], [[0.; 1]; N]);
    for part in 0..k / LANES {
        add(&mut sums, w, a, b, k, part);
    }
    for part in k / LANES * LANES..k {
        add(&mut rest, w, a, b, k, part);
    }
    std::array::from_fn(|i| sums[i].iter().sum::<f32>() + rest[i][0])
}

/// Adds the squares of the `at`-th `L` values of each row.
#[inline(always)]
fn add<const N: usize, const L: usize>(
    sums: &mut [[f32; L]; N],
    w: &[f32],
    a: &[f32],
    b: &[f32],
    k: usize,
    at: usize,
) {
    let part = |row: &[f32]| -> [f32; L] { row[..k].as_chunks::<L>().0[at] };
    let (mut values, r): ([[f32; L]; N], _) =
        (std::array::from_fn(|i| part(&w[i * k..])), b.len() / N);
    for (j, a) in a.chunks_exact(k).enumerate() {
        let a = part(a);
        for i in 0..N {
            let b = b[i * r + j];
            (0..L).for_each(|l| values[i][l] += b * a[l]);
        }
    }
    for (sums, values) in sums.iter_mut().zip(&values) {
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value * value);
    }
}
