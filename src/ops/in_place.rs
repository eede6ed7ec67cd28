//! Thin products added to a matrix in place on the CPU, in blocks of rows that stay in a core's
//! cache: one pass over memory for all terms and the bias, and no buffer of the matrix's size.

use super::backend::{Backend, Term};
use super::buffer::filled;
use super::thin::{self, Lanes};
use candle_core::{CpuStorage, Result, Tensor, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use std::ops::{AddAssign, Range};

/// A float, and the one in which thin products beside it are computed.
pub(super) trait Element: WithDType {
    type Wide: WithDType + AddAssign + Lanes;

    /// Changes `y` through its values in the wide dtype; rounds each once.
    fn change(y: &mut [Self], f: impl FnOnce(&mut [Self::Wide]) -> Result<()>) -> Result<()>;
}

macro_rules! wide {
    ($($t:ty)*) => {$(
        impl Element for $t {
            type Wide = $t;
            fn change(y: &mut [$t], f: impl FnOnce(&mut [$t]) -> Result<()>) -> Result<()> {
                f(y)
            }
        }
    )*};
}
wide! { f32 f64 }

macro_rules! half {
    ($($t:ty)*) => {$(
        impl Element for $t {
            type Wide = f32;
            fn change(y: &mut [$t], f: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
                let mut wide = vec![0.; y.len()];
                y.convert_to_f32_slice(&mut wide);
                f(&mut wide)?;
                y.convert_from_f32_slice(&wide);
                Ok(())
            }
        }
    )*};
}
half! { f16 bf16 }

/// Elements of `y` that one thread works on at a time.
const BLOCK: usize = 1 << 15;

/// Up to this rank a thin product is bound by loads and stores, and [`thin`], which spares
/// those of the sum, is faster than a product and an addition.
const THIN: usize = 32;

/// Rows of a contiguous (num, dim) table, plus the term: each block is written and added to while a
/// core's cache holds it.
pub(super) fn rows<T: Element>(
    table: &[T],
    ids: &[i64],
    dim: usize,
    term: &Term,
) -> Result<Vec<T>> {
    let mut y = filled(T::zero(), ids.len() * dim);
    in_blocks(&mut y, dim, None, std::slice::from_ref(term), |y, block| {
        for (y, id) in y.chunks_exact_mut(dim).zip(&ids[block]) {
            y.copy_from_slice(&table[*id as usize * dim..][..dim]);
        }
    })?;
    Ok(y)
}

/// Columns of a contiguous (r, num) matrix, as rows (ids, r); candle's own go one value at a time and
/// by way of the transposed.
pub(super) fn columns<T: Copy>(a: &[T], ids: &[i64], num: usize) -> Vec<T> {
    let mut y = Vec::with_capacity(a.len() / num.max(1) * ids.len());
    for id in ids {
        y.extend(a.chunks_exact(num).map(|row| row[*id as usize]));
    }
    y
}

/// `wide` in half precision.
pub(super) fn rounded<T: Copy + Default + Send>(wide: &[f32]) -> Vec<T>
where
    [T]: HalfFloatSliceExt,
{
    let mut y = filled(T::default(), wide.len());
    let blocks = y.par_chunks_mut(BLOCK).zip(wide.par_chunks(BLOCK));
    blocks.for_each(|(y, wide)| y.convert_from_f32_slice(wide));
    y
}

/// Rows of `n` values of `y`, plus a bias and the terms.
pub(super) fn plus<T: Element>(
    y: &mut [T],
    n: usize,
    bias: Option<&Tensor>,
    terms: &[Term],
) -> Result<()> {
    match (bias, terms) {
        (None, []) => Ok(()),
        _ => in_blocks(y, n, bias, terms, |_, _| ()),
    }
}

/// Has `fill` write blocks of rows of `y`, and adds to each a bias and the terms.
fn in_blocks<T: Element>(
    y: &mut [T],
    n: usize,
    bias: Option<&Tensor>,
    terms: &[Term],
    fill: impl Fn(&mut [T], Range<usize>) + Sync,
) -> Result<()> {
    if y.is_empty() {
        return Ok(());
    }
    let terms = terms.iter().map(Block::new).collect::<Result<Vec<Block<T::Wide>>>>()?;
    let bias = bias.map(|b| b.to_dtype(T::Wide::DTYPE)?.to_vec1::<T::Wide>()).transpose()?;
    let thin = terms.iter().all(|term| term.thin.is_some());
    let rows = match thin {
        true => (BLOCK / n).max(1).next_multiple_of(thin::ROWS),
        false => (8 * BLOCK / n).max(1),
    };
    y.par_chunks_mut(rows * n).enumerate().try_for_each(|(i, y)| {
        let block = i * rows..i * rows + y.len() / n;
        fill(y, block.clone());
        T::change(y, |y| {
            for term in &terms {
                term.add_to(y, n, &block)?;
            }
            if let Some(bias) = &bias {
                y.chunks_exact_mut(n).for_each(|y| add_to(y, bias));
            }
            Ok(())
        })
    })
}

/// A term, with its factors as slices where it is thin.
struct Block<'a, W> {
    term: &'a Term,
    u: Tensor,
    thin: Option<(Vec<W>, Vec<W>)>,
}

impl<'a, W: WithDType + AddAssign + Lanes> Block<'a, W> {
    fn new(term: &'a Term) -> Result<Self> {
        let values = |t: &Tensor| t.to_dtype(W::DTYPE)?.flatten_all()?.to_vec1();
        let thin = match term.rank() <= THIN {
            true => Some((values(&term.u)?, values(&term.v)?)),
            false => None,
        };
        // Not every backend's product takes rows of a transposed matrix.
        let u = term.u.contiguous()?;
        Ok(Self { term, u, thin })
    }

    /// Adds the term to the rows `block` of a matrix of `n` columns.
    fn add_to(&self, y: &mut [W], n: usize, block: &Range<usize>) -> Result<()> {
        let term = self.term;
        let (from, to) = (block.start.max(term.rows.start), block.end.min(term.rows.end));
        if from >= to {
            return Ok(());
        }
        let y = &mut y[(from - block.start) * n..(to - block.start) * n];
        let (at, cols, rank) = (from - term.rows.start, term.cols.clone(), term.rank());
        match &self.thin {
            Some((u, v)) => {
                let u = &u[at * rank..][..(to - from) * rank];
                thin::add(y, n, cols, u, v, rank);
            }
            None => {
                let ((u, ul), (v, vl)) = (self.u.storage_and_layout(), term.v.storage_and_layout());
                let ul = ul.narrow(0, at, to - from)?;
                let sum = CpuStorage::of(&u)?.product(&ul, CpuStorage::of(&v)?, vl)?;
                let sum = W::cpu_storage_as_slice(&sum)?;
                let lines = y.chunks_exact_mut(n).map(|y| &mut y[cols.clone()]);
                let lines = lines.zip(sum.chunks_exact(cols.len()));
                lines.for_each(|(y, sum)| add_to(y, sum));
            }
        }
        Ok(())
    }
}

pub(super) fn add_to<W: Copy + AddAssign>(y: &mut [W], x: &[W]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += *x);
}
