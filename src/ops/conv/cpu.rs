//! Convolution on the CPU: each sample is unfolded into columns and multiplied; the samples are
//! distributed over the threads.

use super::geometry::Sizes;
use super::unfold::{fold, unfold};
use crate::ops::backend::Backend;
use crate::ops::cpu::{add_assign, filled, gemm_into, Float};
use crate::ops::op::Operand;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, Error, Layout, Result, Shape, WithDType};
use rayon::prelude::*;

/// Which of the three tensors of a convolution is computed from the other two.
#[derive(Clone, Copy)]
pub(super) enum Compute {
    /// (x, w) to y (batch, out, positions)
    Output,
    /// (gradient of y, w) to the gradient of x (batch, in, values)
    Input,
    /// (gradient of y, x) to the gradient of w (out, in/g·k)
    Kernel,
}

impl Compute {
    /// From contiguous operands in F32 or F64.
    pub fn run(self, s: &Sizes, operands: [Operand; 2]) -> Result<(CpuStorage, Shape)> {
        match operands[0].0 {
            CpuStorage::F32(_) => self.typed::<f32>(s, operands),
            CpuStorage::F64(_) => self.typed::<f64>(s, operands),
            x => bail!("convolution: {:?} is neither F32 nor F64", x.dtype()),
        }
    }

    fn typed<T: Float>(self, s: &Sizes, operands: [Operand; 2]) -> Result<(CpuStorage, Shape)> {
        let [a, b] = operands.map(|(storage, l)| Samples { storage, start: l.start_offset() });
        let (y, shape): (Vec<T>, Shape) = match self {
            Self::Output => (output(s, a, b)?, (s.batch, s.c_out, s.positions()).into()),
            Self::Input => (input(s, a, b)?, (s.batch, s.c_in, s.input_len()).into()),
            Self::Kernel => (kernel(s, a, b)?, (s.c_out, s.column_rows()).into()),
        };
        Ok((T::to_cpu_storage_owned(y), shape))
    }
}

/// A contiguous tensor's storage and where it starts.
#[derive(Clone, Copy)]
struct Samples<'a> {
    storage: &'a CpuStorage,
    start: usize,
}

impl<'a> Samples<'a> {
    fn values<T: WithDType>(&self, len: usize) -> Result<&'a [T]> {
        Ok(&T::cpu_storage_as_slice(self.storage)?[self.start..self.start + len])
    }

    /// The `i`-th of the (rows, cols) matrices that it consists of.
    fn matrix(&self, i: usize, rows: usize, cols: usize) -> (&'a CpuStorage, Layout) {
        let start = self.start + i * rows * cols;
        (self.storage, Layout::contiguous_with_offset((rows, cols), start))
    }
}

/// `y = a·b` of two matrices, or `y += a·b`.
fn gemm<T: Float>(
    y: &mut [T],
    add: bool,
    (a, al): (&CpuStorage, Layout),
    (b, bl): (&CpuStorage, Layout),
) -> Result<()> {
    if !gemm_into(y, add, (a, &al), (b, &bl)) {
        let product = T::cpu_storage_data(a.gemm(&al, b, &bl)?)?;
        if add {
            add_assign(y, &product);
        } else {
            y.copy_from_slice(&product);
        }
    }
    Ok(())
}

/// One group's columns of one sample (column_rows, positions), in a buffer that is reused.
struct Columns<T>(Vec<T>);

impl<T: WithDType> Columns<T> {
    fn new(s: &Sizes) -> Self {
        Self(vec![T::zero(); s.column_rows() * s.positions()])
    }

    /// Unfolds `x` and passes the columns to `f` as an operand of a GEMM.
    fn with<R>(
        &mut self,
        s: &Sizes,
        x: &[T],
        f: impl FnOnce((&CpuStorage, Layout)) -> Result<R>,
    ) -> Result<R> {
        unfold(s, x, &mut self.0);
        let storage = T::to_cpu_storage_owned(std::mem::take(&mut self.0));
        let r = f((&storage, Layout::contiguous((s.column_rows(), s.positions()))));
        self.0 = T::cpu_storage_data(storage)?;
        r
    }
}

/// The input values of one group in a sample, and the output channels of a group.
fn per_group(s: &Sizes) -> (usize, usize) {
    (s.c_in / s.geometry.groups * s.input_len(), s.c_out / s.geometry.groups)
}

/// The number of samples that one thread computes.
fn samples_per_thread(s: &Sizes) -> usize {
    s.batch.div_ceil(rayon::current_num_threads()).max(1)
}

fn output<T: Float>(s: &Sizes, x: Samples, w: Samples) -> Result<Vec<T>> {
    let (groups, n) = (s.geometry.groups, s.positions());
    let (x_len, outs) = per_group(s);
    let x = x.values::<T>(s.batch * groups * x_len)?;
    let mut y = filled(T::zero(), s.batch * s.c_out * n);
    let share = samples_per_thread(s) * groups;
    let shares =
        y.par_chunks_mut((share * outs * n).max(1)).zip(x.par_chunks((share * x_len).max(1)));
    shares.try_for_each(|(y, x)| {
        let mut columns = Columns::new(s);
        let outputs = y.chunks_mut(outs * n).zip(x.chunks(x_len.max(1)));
        for (i, (y, x)) in outputs.enumerate() {
            let w = w.matrix(i % groups, outs, s.column_rows());
            columns.with(s, x, |columns| gemm(y, false, w, columns))?;
        }
        Ok::<_, Error>(())
    })?;
    Ok(y)
}

fn input<T: Float>(s: &Sizes, grad: Samples, w: Samples) -> Result<Vec<T>> {
    let groups = s.geometry.groups;
    let (x_len, outs) = per_group(s);
    let mut gx = filled(T::zero(), s.batch * groups * x_len);
    let share = samples_per_thread(s) * groups;
    gx.par_chunks_mut((share * x_len).max(1)).enumerate().try_for_each(|(at, gx)| {
        let mut columns = vec![T::zero(); s.column_rows() * s.positions()];
        for (i, gx) in gx.chunks_mut(x_len.max(1)).enumerate() {
            let (w, wl) = w.matrix(i % groups, outs, s.column_rows());
            let grad = grad.matrix(at * share + i, outs, s.positions());
            gemm(&mut columns, false, (w, wl.transpose(0, 1)?), grad)?;
            fold(s, &columns, gx);
        }
        Ok::<_, Error>(())
    })?;
    Ok(gx)
}

fn kernel<T: Float>(s: &Sizes, grad: Samples, x: Samples) -> Result<Vec<T>> {
    let groups = s.geometry.groups;
    let (x_len, outs) = per_group(s);
    let x = x.values::<T>(s.batch * groups * x_len)?;
    let zeros = || vec![T::zero(); s.c_out * s.column_rows()];
    let share = samples_per_thread(s) * groups;
    let shares = x.par_chunks((share * x_len).max(1)).enumerate().map(|(at, x)| {
        let (mut gw, mut columns) = (zeros(), Columns::new(s));
        for (i, x) in x.chunks(x_len.max(1)).enumerate() {
            let gw = &mut gw[i % groups * outs * s.column_rows()..][..outs * s.column_rows()];
            let grad = grad.matrix(at * share + i, outs, s.positions());
            columns.with(s, x, |(c, l)| gemm(gw, true, grad, (c, l.transpose(0, 1)?)))?;
        }
        Ok::<_, Error>(gw)
    });
    shares.try_reduce(zeros, |mut a, b| {
        add_assign(&mut a, &b);
        Ok(a)
    })
}
