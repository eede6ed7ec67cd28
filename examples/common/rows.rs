//! Row by row on the CPU: one pass in all threads, with the machine's widest vector instructions,
//! where candle's own operations would take several in one thread.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, D};
use rayon::prelude::*;

/// Values that a thread works on at a time.
const BLOCK: usize = 1 << 14;

/// A tensor like `xs`, each of whose rows `f` fills from theirs. `xs` are of one shape; `None` unless
/// they are F32 and contiguous on the CPU.
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
        pulp::Arch::new().dispatch(|| {
            for (j, y) in y.chunks_exact_mut(n).enumerate() {
                let at = i * block + j * n;
                f(values.map(|x| &x[at..at + n]), y);
            }
        });
    });
    Tensor::from_vec(y, shape, &Device::Cpu).map(Some)
}

/// The sum of `f(i)` over `0..n`, in an order that vector instructions can follow.
#[inline(always)]
pub fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
    }
    lanes.iter().sum::<f32>() + (whole..n).map(f).sum::<f32>()
}
