//! Row operations in F32: one pass over memory in all threads, compiled for the widest vector
//! instructions of the machine. candle's own operations take a pass and a buffer for each step.

use super::buffer::{add_assign, filled};
use crate::ops::backend::Backend;
use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, Layout, Result, Shape, Storage, Tensor, WithDType};
use rayon::prelude::*;
use std::array;

/// Values that one thread works on at a time.
const BLOCK: usize = 1 << 14;

/// A tensor's storage and layout.
type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// Computes each row of the output by `f`, from its index and the same row of each of `xs`: contiguous F32 tensors of
/// one shape, which is the output's, or a single row for all. `f` must be `#[inline(always)]`: only inlined code is
/// compiled for the vector instructions.
pub(in crate::ops) fn map_rows<const N: usize>(
    xs: [Operand; N],
    f: impl Fn(usize, [&[f32]; N], &mut [f32]) + Sync,
) -> Result<(CpuStorage, Shape)> {
    let shape = xs[0].1.shape();
    let xs = f32_slices(xs)?;
    let (n, len) = (shape.dims().last().copied().unwrap_or(1), xs[0].len());
    let mut y = filled(0., len);
    if len > 0 {
        let block = (BLOCK / n).max(1);
        y.par_chunks_mut(block * n).enumerate().for_each(|(i, y)| {
            vectorized(
                #[inline(always)]
                || {
                    for (row, y) in (i * block..).zip(y.chunks_exact_mut(n)) {
                        let x = |x: &'_ [f32]| if x.len() == len { row * n } else { 0 };
                        f(row, xs.map(|values| &values[x(values)..][..n]), y);
                    }
                },
            );
        });
    }
    Ok((CpuStorage::F32(y), shape.clone()))
}

/// [`map_rows`] of tensors, without a graph.
pub(in crate::ops) fn map_tensor_rows<const N: usize>(
    xs: [&Tensor; N],
    f: impl Fn(usize, [&[f32]; N], &mut [f32]) + Sync,
) -> Result<Tensor> {
    on_cpu(xs, |xs| map_rows(xs, f))
}

/// Computes a tensor from others on the CPU, without a graph.
pub(in crate::ops) fn on_cpu<const N: usize>(
    xs: [&Tensor; N],
    f: impl FnOnce([Operand; N]) -> Result<(CpuStorage, Shape)>,
) -> Result<Tensor> {
    let guards = xs.map(Tensor::storage_and_layout);
    let storages =
        guards.iter().map(|(storage, _)| CpuStorage::of(storage)).collect::<Result<Vec<_>>>()?;
    let (y, shape) = f(array::from_fn(|i| (storages[i], guards[i].1)))?;
    Ok(Tensor::from_storage(Storage::Cpu(y), shape, BackpropOp::none(), false))
}

/// The sum over all rows of `a ∘ b`, contiguous F32 tensors (.., n) on the CPU, without a graph. The order of the
/// sum does not depend on the threads.
pub(in crate::ops) fn sum_of_products(xs: [&Tensor; 2]) -> Result<Tensor> {
    /// Values of each that are summed at a time.
    const PART: usize = 1 << 16;
    on_cpu(xs, |xs| {
        let n = xs[0].1.dims().last().copied().unwrap_or(1);
        let [a, b] = f32_slices(xs)?;
        let part = (PART / n.max(1)).max(1) * n.max(1);
        let parts = a.par_chunks(part).zip(b.par_chunks(part)).map(|(a, b)| {
            let mut sums = vec![0f32; n];
            vectorized(
                #[inline(always)]
                || {
                    for (a, b) in a.chunks_exact(n).zip(b.chunks_exact(n)) {
                        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
                    }
                },
            );
            sums
        });
        let mut sums = vec![0.; n];
        parts.collect::<Vec<_>>().iter().for_each(|part| add_assign(&mut sums, part));
        Ok((CpuStorage::F32(sums), n.into()))
    })
}

/// The least number of values for a thread.
const PER_THREAD: usize = if cfg!(test) { 1 << 8 } else { 1 << 16 };

/// ‖w‖² of each row of `w` (out, in), a contiguous F32 tensor on the CPU.
pub(in crate::ops) fn row_squares((w, l): Operand) -> Result<(CpuStorage, Shape)> {
    let ((rows, k), [w]) = (l.shape().dims2()?, f32_slices([(w, l)])?);
    let mut squares = vec![0f32; rows];
    let least = PER_THREAD.div_ceil(k.max(1));
    squares.par_iter_mut().enumerate().with_min_len(least).for_each(|(i, square)| {
        let row = &w[i * k..][..k];
        vectorized(
            #[inline(always)]
            || *square = sum(row, row, |a, b| a * b),
        );
    });
    Ok((CpuStorage::F32(squares), rows.into()))
}

/// The values of contiguous F32 operands.
pub(in crate::ops) fn f32_slices<'a, const N: usize>(
    xs: [(&'a CpuStorage, &Layout); N],
) -> Result<[&'a [f32]; N]> {
    let mut values = [&[][..]; N];
    for (values, (storage, layout)) in values.iter_mut().zip(xs) {
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("an operand of a fused operation is not contiguous: {layout:?}")
        };
        *values = &f32::cpu_storage_as_slice(storage)?[from..to];
    }
    Ok(values)
}

/// Calls `f`, which must be `#[inline(always)]`, compiled for the widest vector instructions.
pub(super) fn vectorized(f: impl FnOnce()) {
    pulp::Arch::new().dispatch(Vectorized(f));
}

struct Vectorized<F>(F);

impl<F: FnOnce()> pulp::WithSimd for Vectorized<F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        (self.0)();
    }
}

/// The sum of `f(a, b)` over two rows, in 16 lanes, which the compiler vectorizes.
#[inline(always)]
pub(in crate::ops) fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    let rest = a_rest.iter().zip(b_rest).map(|(&a, &b)| f(a, b)).sum::<f32>();
    let mut lanes = [0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The maximum of a row. NaN is ignored.
#[inline(always)]
pub(in crate::ops) fn max(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = lane.max(*x));
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// `eˣ` for x ≤ 0 with a relative error of 3e-7, without a branch: `2ⁿ·eʳ` with |r| ≤ ln 2 / 2. Below
/// -87 it is 0.
#[inline(always)]
pub(in crate::ops) fn exp_nonpositive(x: f32) -> f32 {
    const LEAST: f32 = -87.;
    // Not `max`, which would replace NaN.
    let bounded = if x < LEAST { LEAST } else { x };
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.;
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 as a sum of two numbers; n times the first is exact.
    let r = (bounded - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let series = 1.
        + r * (1. + r * (0.5 + r * (1. / 6. + r * (1. / 24. + r * (1. / 120. + r * (1. / 720.))))));
    let y = series * f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x < LEAST {
        0.
    } else {
        y
    }
}

#[cfg(test)]
mod tests {
    use super::exp_nonpositive;

    #[test]
    fn the_exponential_is_right_to_3e_7() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp_nonpositive(x)) - exact).abs() <= 3e-7 * exact, "{x}");
        }
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.);
        assert!(exp_nonpositive(f32::NAN).is_nan());
    }
}
