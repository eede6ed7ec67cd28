//! Row by row on the CPU: one pass in all threads, with the machine's widest vector instructions,
//! where candle's own operations would take several in one thread.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, D};
use rayon::prelude::*;

/// Values that a thread works on at a time.
const BLOCK: usize = 1 << 14;

/// A tensor like `xs`, each of whose rows `f` fills from theirs. `xs` are of one shape; `None` unless
/// they are F32 and contiguous on the CPU. `f` is to be `#[inline(always)]`: only what is inlined is
/// compiled for the machine's instructions.
pub fn by_rows<const N: usize>(
    xs: [&Tensor; N],
    f: impl Fn([&[f32]; N], &mut [f32]) + Sync,
) -> Result<Option<Tensor>> {
    let shape = xs[0].shape();
    let n = xs[0].dim(D::Minus1)?;
    let guards = xs.map(Tensor::storage_and_layout);
    let values = guards.each_ref().map(|(storage, layout)| match &**storage {
        Storage::Cpu(CpuStorage::F32(values)) if layout.shape() == shape => {
            layout.contiguous_offsets().map(|(from, to)| &values[from..to])
        }
        _ => None,
    });
    if n == 0 || values.iter().any(Option::is_none) {
        return Ok(None);
    }
    let values = values.map(Option::unwrap_or_default);
    let block = (BLOCK / n).max(1) * n;
    let mut y = vec![0f32; shape.elem_count()];
    y.par_chunks_mut(block).enumerate().for_each(|(i, y)| {
        let xs = values.map(|x| &x[i * block..][..y.len()]);
        pulp::Arch::new().dispatch(Rows { xs, y, n, f: &f });
    });
    Tensor::from_vec(y, shape, &Device::Cpu).map(Some)
}

/// Some rows of `n`, for the widest vector instructions of the machine.
struct Rows<'a, F, const N: usize> {
    xs: [&'a [f32]; N],
    y: &'a mut [f32],
    n: usize,
    f: &'a F,
}

impl<F: Fn([&[f32]; N], &mut [f32]), const N: usize> pulp::WithSimd for Rows<'_, F, N> {
    type Output = ();

    // Inlined, all of it, into the one place that is compiled for those instructions.
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        for (i, y) in self.y.chunks_exact_mut(self.n).enumerate() {
            (self.f)(self.xs.map(|x| &x[i * self.n..][..self.n]), y);
        }
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
