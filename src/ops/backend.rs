//! Adding thin products and a bias to a matrix that a backend has just made: in place on the CPU,
//! a block of rows at a time; by the backend's own operations elsewhere.

use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{
    bail, CpuStorage, CudaStorage, DType, Layout, MetalStorage, Result, Storage, Tensor, WithDType,
};
use rayon::prelude::*;
use std::ops::{AddAssign, Range};

/// `y[rows, cols] += u·v`, with `u` (rows, k) and `v` (k, cols), and a small `k`.
#[derive(Debug, Clone)]
pub(crate) struct Term {
    pub u: Tensor,
    pub v: Tensor,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl Term {
    fn bmnk(&self, rows: usize) -> (usize, usize, usize, usize) {
        (1, rows, self.cols.len(), self.u.layout().dims()[1])
    }
}

pub(crate) trait Backend: BackendStorage {
    /// This backend's view of a tensor's storage.
    fn of(storage: &Storage) -> Result<&Self>;

    /// `self`, a contiguous (m, n) matrix, with the bias added to each row and each term to its
    /// block.
    fn plus(self, dims: (usize, usize), bias: Option<&Tensor>, terms: &[Term]) -> Result<Self> {
        plus_by_passes(self, dims, bias, terms)
    }
}

impl Backend for CpuStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Cpu(s) => Ok(s),
            s => bail!("a tensor is on {:?} and its operand on the CPU", s.device().location()),
        }
    }

    fn plus(mut self, dims: (usize, usize), bias: Option<&Tensor>, terms: &[Term]) -> Result<Self> {
        match &mut self {
            CpuStorage::F32(y) => plus_in_place(y, dims.1, bias, terms)?,
            CpuStorage::F64(y) => plus_in_place(y, dims.1, bias, terms)?,
            _ => return plus_by_passes(self, dims, bias, terms),
        }
        Ok(self)
    }
}

impl Backend for CudaStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Cuda(s) => Ok(s),
            s => bail!("a tensor is on {:?} and its operand on CUDA", s.device().location()),
        }
    }
}

impl Backend for MetalStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Metal(s) => Ok(s),
            s => bail!("a tensor is on {:?} and its operand on Metal", s.device().location()),
        }
    }
}

fn plus_by_passes<S: Backend>(
    mut y: S,
    (m, n): (usize, usize),
    bias: Option<&Tensor>,
    terms: &[Term],
) -> Result<S> {
    let layout = Layout::contiguous((m, n));
    for term in terms {
        let ((u, ul), (v, vl)) = (term.u.storage_and_layout(), term.v.storage_and_layout());
        let (rows, cols) = (term.rows.len(), term.cols.len());
        let block = Layout::contiguous((rows, cols));
        let mut add = S::of(&u)?.matmul(S::of(&v)?, term.bmnk(rows), ul, vl)?;
        if add.dtype() != y.dtype() {
            add = add.to_dtype(&block, y.dtype())?;
        }
        let place = layout.narrow(0, term.rows.start, rows)?.narrow(1, term.cols.start, cols)?;
        let sum = y.binary_impl::<Add>(&add, &place, &block)?;
        if (rows, cols) == (m, n) {
            y = sum;
        } else {
            sum.copy2d(&mut y, rows, cols, cols, n, 0, place.start_offset())?;
        }
    }
    if let Some(bias) = bias {
        let (b, bl) = bias.storage_and_layout();
        y = y.binary_impl::<Add>(S::of(&b)?, &layout, &bl.broadcast_as((m, n))?)?;
    }
    Ok(y)
}

/// Elements of `y` that one thread works on at a time, so that they and the product added to them
/// stay in its cache: the sum then costs no pass over memory.
const BLOCK: usize = 1 << 15;

fn plus_in_place<T: WithDType + AddAssign>(
    y: &mut [T],
    n: usize,
    bias: Option<&Tensor>,
    terms: &[Term],
) -> Result<()> {
    if y.is_empty() || (bias.is_none() && terms.is_empty()) {
        return Ok(());
    }
    let guards: Vec<_> =
        terms.iter().map(|t| (t.u.storage_and_layout(), t.v.storage_and_layout())).collect();
    let operands = guards
        .iter()
        .map(|((u, _), (v, _))| Ok((CpuStorage::of(u)?, CpuStorage::of(v)?)))
        .collect::<Result<Vec<_>>>()?;
    let bias = bias.map(|b| b.to_dtype(T::DTYPE)?.to_vec1::<T>()).transpose()?;
    let rows = (BLOCK / n).max(1);
    y.par_chunks_mut(rows * n).enumerate().try_for_each(|(i, y)| {
        let (first, last) = (i * rows, i * rows + y.len() / n);
        for (term, &(u, v)) in terms.iter().zip(&operands) {
            let (from, to) = (first.max(term.rows.start), last.min(term.rows.end));
            if from >= to {
                continue;
            }
            let ul = term.u.layout().narrow(0, from - term.rows.start, to - from)?;
            let add = u.matmul(v, term.bmnk(to - from), &ul, term.v.layout())?;
            let add = T::cpu_storage_as_slice(&add)?;
            let lines = y[(from - first) * n..(to - first) * n].chunks_exact_mut(n);
            for (y, add) in lines.zip(add.chunks_exact(term.cols.len())) {
                add_assign(&mut y[term.cols.clone()], add);
            }
        }
        if let Some(bias) = &bias {
            y.chunks_exact_mut(n).for_each(|y| add_assign(y, bias));
        }
        Ok(())
    })
}

fn add_assign<T: Copy + AddAssign>(y: &mut [T], x: &[T]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += *x);
}

/// The dtype in which low-rank products are computed beside a base of `dtype`.
pub(crate) fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}
