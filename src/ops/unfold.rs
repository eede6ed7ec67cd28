//! Unfolding an input into the columns of a convolution (im2col), and folding columns back, adding
//! where they overlap.

use super::conv::{product3, Sizes};
use candle_core::WithDType;
use std::ops::{AddAssign, Range};

/// One group's input of one sample (in/g, spatial..) to `columns` (in/g·k, positions).
pub(super) fn unfold<T: WithDType>(s: &Sizes, x: &[T], columns: &mut [T]) {
    let lines = columns.chunks_exact_mut(s.output[2]);
    for (column, run) in lines.zip(runs(s)) {
        let Some(run) = run else {
            column.fill(T::zero());
            continue;
        };
        column[..run.out.start].fill(T::zero());
        column[run.out.end..].fill(T::zero());
        let column = &mut column[run.out.clone()];
        if s.geometry.stride[2] == 1 {
            column.copy_from_slice(&x[run.x..run.x + column.len()]);
        } else {
            let x = x[run.x..].iter().step_by(s.geometry.stride[2]);
            column.iter_mut().zip(x).for_each(|(c, x)| *c = *x);
        }
    }
}

/// The transpose of [`unfold`]: `x` += what each of its values contributed.
pub(super) fn fold<T: WithDType + AddAssign>(s: &Sizes, columns: &[T], x: &mut [T]) {
    for (column, run) in columns.chunks_exact(s.output[2]).zip(runs(s)) {
        let Some(run) = run else { continue };
        let x = x[run.x..].iter_mut().step_by(s.geometry.stride[2]);
        column[run.out].iter().zip(x).for_each(|(c, x)| *x += *c);
    }
}

/// A stretch of output positions along the last dimension that meets the input from `x` on, a
/// stride apart.
struct Run {
    out: Range<usize>,
    x: usize,
}

/// The run of each line of the columns, in their order; `None` where all of it is padding.
fn runs(s: &Sizes) -> impl Iterator<Item = Option<Run>> + '_ {
    let [k0, k1, k2] = s.geometry.kernel;
    let channels = s.c_in / s.geometry.groups;
    let last: Vec<_> = (0..k2).map(|k| inside(s, k)).collect();
    (0..channels).flat_map(move |c| {
        let last = last.clone();
        product3(k0, k1, k2).flat_map(move |(a, b, k)| {
            let out = last[k].clone();
            product3(1, s.output[0], s.output[1]).map(move |(_, i, j)| {
                let (i, j) = (s.meets(0, a, i)?, s.meets(1, b, j)?);
                let first = s.meets(2, k, out.start)?;
                let x = ((c * s.input[0] + i) * s.input[1] + j) * s.input[2] + first;
                Some(Run { out: out.clone(), x })
            })
        })
    })
}

/// The output positions along the last dimension at which kernel offset `k` is inside the input.
fn inside(s: &Sizes, k: usize) -> Range<usize> {
    let positions = 0..s.output[2];
    let start = positions.clone().find(|&o| s.meets(2, k, o).is_some());
    let end = positions.rev().find(|&o| s.meets(2, k, o).is_some());
    match (start, end) {
        (Some(start), Some(end)) => start..end + 1,
        _ => s.output[2]..s.output[2],
    }
}
