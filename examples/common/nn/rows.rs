//! Row by row on the CPU: one pass in all threads, with the machine's widest vector instructions,
//! where candle's own operations would take several in one thread.

use super::computed::Value;
use candle_core::{CpuStorage, Result, Storage, Tensor};
use rayon::prelude::*;

/// Values that a thread works on at a time.
const BLOCK: usize = 1 << 14;

/// What `f` makes of the values of `xs`; `None` unless these are F32 and contiguous on the CPU.
pub fn values<const N: usize, R>(xs: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> R) -> Option<R> {
    let guards = xs.map(Tensor::storage_and_layout);
    let values = guards.each_ref().map(|(storage, layout)| match &**storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            layout.contiguous_offsets().map(|(from, to)| &values[from..to])
        }
        _ => None,
    });
    match values.iter().all(Option::is_some) {
        true => Some(f(values.map(Option::unwrap_or_default))),
        false => None,
    }
}

/// A value shaped like `xs[0]`: `f` fills each row from the operands' rows. `xs` are of one shape, or a
/// single row for all; `None` unless they are F32 and contiguous on the CPU. `f` is to be
/// `#[inline(always)]`: only what is inlined is compiled for the machine's instructions.
pub fn by_rows<const N: usize>(
    xs: [&Tensor; N],
    f: impl Fn([&[f32]; N], &mut [f32]) + Sync,
) -> Result<Option<Value>> {
    let shape = xs[0].shape();
    let Some(&n) = shape.dims().last() else { return Ok(None) };
    let fits = |x: &&Tensor| x.shape() == shape || x.dims() == [n];
    if n == 0 || !xs.iter().all(fits) {
        return Ok(None);
    }
    let len = shape.elem_count();
    let block = (BLOCK / n).max(1) * n;
    let y = values(xs, |xs| {
        let mut y = zeros(len);
        y.par_chunks_mut(block).enumerate().for_each(|(i, y)| {
            let xs = xs.map(|x| if x.len() == len { &x[i * block..][..y.len()] } else { x });
            vectorized(
                #[inline(always)]
                || {
                    for (i, y) in y.chunks_exact_mut(n).enumerate() {
                        // A single row is every row's.
                        let at = |x: &[f32]| if x.len() == n { 0 } else { i * n };
                        f(xs.map(|x| &x[at(x)..][..n]), y);
                    }
                },
            );
        });
        y
    });
    Ok(y.map(|y| Value::Fresh(y, shape.clone())))
}

/// Zeros, written by all threads: the first touch of new memory costs several times a pass over it.
fn zeros(len: usize) -> Vec<f32> {
    let lines = rayon::iter::repeat_n([0f32; 16], len.div_ceil(16)).with_min_len(BLOCK / 16);
    let mut y = lines.collect::<Vec<_>>().into_flattened();
    y.truncate(len);
    y
}

/// Calls `f`, which is to be `#[inline(always)]`, compiled for the machine's widest vector instructions.
pub fn vectorized(f: impl FnOnce()) {
    pulp::Arch::new().dispatch(Vectorized(f));
}

struct Vectorized<F>(F);

impl<F: FnOnce()> pulp::WithSimd for Vectorized<F> {
    type Output = ();

    // Inlined into the one place that is compiled for those instructions.
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        (self.0)();
    }
}

/// The sum of `f(a, b)` over two rows, in an order that vector instructions can follow.
#[inline(always)]
pub fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let (a, b) = (a.chunks_exact(lanes.len()), b.chunks_exact(lanes.len()));
    let rest = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| f(a, b)).sum::<f32>();
    for (a, b) in a.zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The max of a row, in the same way.
#[inline(always)]
pub fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = row.chunks_exact(lanes.len());
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = lane.max(*x));
    }
    lanes.into_iter().fold(rest, f32::max)
}
