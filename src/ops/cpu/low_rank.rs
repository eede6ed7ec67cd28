//! Low-rank terms and a bias added to a matrix in place, in blocks of rows that fit a core's cache: one
//! pass over memory for all of them, and no buffer of the matrix's size.

use super::buffer::{add_assign, filled};
use super::gemm::{gemm_view, Real, View};
use crate::ops::backend::{Backend, LowRankTerm};
use candle_core::{CpuStorage, Result, Tensor, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use std::ops::{AddAssign, Range};

/// A float that low-rank terms are computed in.
pub(in crate::ops) trait Float: WithDType + AddAssign + Real {}
impl<T: WithDType + AddAssign + Real> Float for T {}

/// A float, and the one in which low-rank terms beside it are computed.
pub(super) trait Element: WithDType {
    type Compute: Float;

    /// Changes the values of `y` by `f` in the compute dtype, and rounds each once.
    fn update(y: &mut [Self], f: impl FnOnce(&mut [Self::Compute]) -> Result<()>) -> Result<()>;
}

macro_rules! full_precision {
    ($($t:ty)*) => {$(
        impl Element for $t {
            type Compute = $t;
            fn update(y: &mut [$t], f: impl FnOnce(&mut [$t]) -> Result<()>) -> Result<()> {
                f(y)
            }
        }
    )*};
}
full_precision! { f32 f64 }

macro_rules! half_precision {
    ($($t:ty)*) => {$(
        impl Element for $t {
            type Compute = f32;
            fn update(y: &mut [$t], f: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
                let mut upcast = vec![0.; y.len()];
                y.convert_to_f32_slice(&mut upcast);
                f(&mut upcast)?;
                y.convert_from_f32_slice(&upcast);
                Ok(())
            }
        }
    )*};
}
half_precision! { f16 bf16 }

/// Elements of `y` that one thread works on at a time.
const BLOCK: usize = 1 << 15;

/// `x` in half precision.
pub(super) fn to_half<T: Copy + Default + Send>(x: &[f32]) -> Vec<T>
where
    [T]: HalfFloatSliceExt,
{
    let mut y = filled(T::default(), x.len());
    let blocks = y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK));
    blocks.for_each(|(y, x)| y.convert_from_f32_slice(x));
    y
}

/// Adds a bias and the terms to `y`, in rows of `n`.
pub(super) fn add<T: Element>(
    y: &mut [T],
    n: usize,
    bias: Option<&Tensor>,
    terms: &[LowRankTerm],
) -> Result<()> {
    if y.is_empty() || (bias.is_none() && terms.is_empty()) {
        return Ok(());
    }
    let terms = terms.iter().map(PreparedTerm::new).collect::<Result<Vec<_>>>()?;
    let bias = bias.map(|b| b.to_dtype(T::Compute::DTYPE)?.to_vec1::<T::Compute>()).transpose()?;
    let rows = (BLOCK / n).max(1);
    y.par_chunks_mut(rows * n).enumerate().try_for_each(|(i, y)| {
        let block = i * rows..i * rows + y.len() / n;
        T::update(y, |y| {
            for term in &terms {
                term.add_to(y, n, &block)?;
            }
            if let Some(bias) = &bias {
                y.chunks_exact_mut(n).for_each(|y| add_assign(y, bias));
            }
            Ok(())
        })
    })
}

/// A term with its factors in the compute dtype: as values for [`gemm_view`], and `u` as a tensor for builds
/// without it.
struct PreparedTerm<'a, T> {
    term: &'a LowRankTerm,
    u: Tensor,
    values: (Vec<T>, Vec<T>),
    /// Whether the values of v are those of its transpose.
    transposed: bool,
}

impl<'a, T: Float> PreparedTerm<'a, T> {
    fn new(term: &'a LowRankTerm) -> Result<Self> {
        let values = |t: &Tensor| t.to_dtype(T::DTYPE)?.flatten_all()?.to_vec1();
        // v is often a transposed B: its values as they are stored.
        let transposed = term.v.t()?.is_contiguous();
        let v = if transposed { term.v.t()? } else { term.v.clone() };
        let values = (values(&term.u)?, values(&v)?);
        // Not every backend's GEMM takes rows of a transposed matrix.
        Ok(Self { term, u: term.u.contiguous()?, values, transposed })
    }

    /// Adds the term to the rows `block` of a matrix of `n` columns.
    fn add_to(&self, y: &mut [T], n: usize, block: &Range<usize>) -> Result<()> {
        let term = self.term;
        let (from, to) = (block.start.max(term.rows.start), block.end.min(term.rows.end));
        if from >= to || term.cols.is_empty() {
            return Ok(());
        }
        let y = &mut y[(from - block.start) * n..(to - block.start) * n];
        let (at, rows, rank) = (from - term.rows.start, to - from, term.rank());
        let (u, v) = &self.values;
        let u = (u.as_slice(), View::new(at * rank, rows, rank, rank));
        let cols = term.cols.len();
        let view = match self.transposed {
            true => View::new(0, cols, rank, rank).t(),
            false => View::new(0, rank, cols, cols),
        };
        let v = (v.as_slice(), view);
        let place = View::new(term.cols.start, rows, term.cols.len(), n);
        if gemm_view((&mut *y, place), true, u, v, 1.) {
            return Ok(());
        }
        let ((u, ul), (v, vl)) = (self.u.storage_and_layout(), term.v.storage_and_layout());
        let product =
            CpuStorage::of(&u)?.gemm(&ul.narrow(0, at, rows)?, CpuStorage::of(&v)?, vl)?;
        let product = T::cpu_storage_as_slice(&product)?;
        let lines = y.chunks_exact_mut(n).zip(product.chunks_exact(term.cols.len()));
        lines.for_each(|(y, product)| add_assign(&mut y[term.cols.clone()], product));
        Ok(())
    }
}
