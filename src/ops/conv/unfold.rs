//! Unfolding an input into the columns of a convolution (im2col), and folding columns back, adding
//! where they overlap.

use super::geometry::{index3, Sizes};
use candle_core::WithDType;
use std::ops::{AddAssign, Range};

/// One group's input of one sample (in/g, spatial..) to `columns` (in/g·k, positions).
pub(super) fn unfold<T: WithDType>(s: &Sizes, x: &[T], columns: &mut [T]) {
    let (len, stride) = (s.output[2], s.geometry.stride[2]);
    each_run(s, |line, run| {
        let column = &mut columns[line * len..][..len];
        let Some(run) = run else { return column.fill(T::zero()) };
        column[..run.out.start].fill(T::zero());
        column[run.out.end..].fill(T::zero());
        let column = &mut column[run.out];
        match stride {
            1 => column.copy_from_slice(&x[run.x..run.x + column.len()]),
            _ => {
                let x = x[run.x..].iter().step_by(stride);
                column.iter_mut().zip(x).for_each(|(c, x)| *c = *x);
            }
        }
    });
}

/// The transpose of [`unfold`]: adds each value of the columns to the value of `x` that it was copied from.
pub(super) fn fold<T: WithDType + AddAssign>(s: &Sizes, columns: &[T], x: &mut [T]) {
    let (len, stride) = (s.output[2], s.geometry.stride[2]);
    each_run(s, |line, run| {
        let Some(run) = run else { return };
        let (column, x) = (&columns[line * len..][run.out], &mut x[run.x..]);
        match stride {
            // Contiguous, so that the compiler vectorizes it.
            1 => x.iter_mut().zip(column).for_each(|(x, c)| *x += *c),
            _ => x.iter_mut().step_by(stride).zip(column).for_each(|(x, c)| *x += *c),
        }
    });
}

/// A stretch of output positions along the last dimension that meets the input from `x` on, a
/// stride apart.
struct Run {
    out: Range<usize>,
    x: usize,
}

/// Calls `f` for each line of the columns, with its number and its run; `None` where all of it is padding.
fn each_run(s: &Sizes, mut f: impl FnMut(usize, Option<Run>)) {
    let [k0, k1, k2] = s.geometry.kernel;
    let last: Vec<_> = (0..k2).map(|k| inside(s, k)).collect();
    let mut line = 0;
    for c in 0..s.c_in / s.geometry.groups {
        for (a, b, k) in index3(k0, k1, k2) {
            let out = &last[k];
            let first = s.input_index(2, k, out.start);
            for i in 0..s.output[0] {
                let plane = s.input_index(0, a, i).map(|i| (c * s.input[0] + i) * s.input[1]);
                for j in 0..s.output[1] {
                    let x = || Some((plane? + s.input_index(1, b, j)?) * s.input[2] + first?);
                    f(line, x().map(|x| Run { out: out.clone(), x }));
                    line += 1;
                }
            }
        }
    }
}

/// The output positions along the last dimension at which kernel offset `k` is inside the input.
fn inside(s: &Sizes, k: usize) -> Range<usize> {
    let positions = 0..s.output[2];
    let start = positions.clone().find(|&o| s.input_index(2, k, o).is_some());
    let end = positions.rev().find(|&o| s.input_index(2, k, o).is_some());
    match (start, end) {
        (Some(start), Some(end)) => start..end + 1,
        _ => s.output[2]..s.output[2],
    }
}
