//! `W + ΔW`, computed in F32 (F64 beside F64) and rounded once, on the CPU with ΔW added block by
//! block and never built.

use super::backend::{wide, Backend, Term};
use super::op::{Custom, Op};
use candle_core::{bail, CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, WithDType};
use rayon::prelude::*;

/// The contiguous `w`, seen as a matrix of shape `matrix`, plus the terms. Errors if a value of the
/// result is not finite.
pub(crate) fn merge(w: &Tensor, matrix: (usize, usize), terms: Vec<Term>) -> Result<Tensor> {
    let merged = w
        .contiguous()?
        .apply_op1_no_bwd(&Custom(Merge { matrix, terms }))?
        .to_dtype(w.dtype())?
        .detach();
    if !is_finite(&merged)? {
        bail!(
            "the merged weight {:?} of {:?} is not finite: the base or the adapter holds NaN, \
             infinite or too large values",
            merged.dims(),
            merged.dtype()
        )
    }
    Ok(merged)
}

struct Merge {
    matrix: (usize, usize),
    terms: Vec<Term>,
}

impl Op<1> for Merge {
    const NAME: &'static str = "merge";

    fn forward<S: Backend>(&self, [(w, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        // A copy even where the dtype is the same: the base is never written.
        let copy = w.to_dtype(l, wide(w.dtype()))?;
        Ok((copy.plus(self.matrix, None, &self.terms)?, l.shape().clone()))
    }

    fn backward(&self, _: [&Tensor; 1], _: &Tensor) -> Result<[Option<Tensor>; 1]> {
        bail!("a merged weight has no gradient")
    }
}

/// Whether every value of `t` is finite.
pub(crate) fn is_finite(t: &Tensor) -> Result<bool> {
    fn all<T: WithDType>(t: &[T]) -> bool {
        // Without an early end, so that the compiler can take a vector at a time.
        let block = |t: &[T]| t.iter().fold(true, |all, v| all & v.to_f64().is_finite());
        t.par_chunks(1 << 16).all(block)
    }
    if t.elem_count() == 0 {
        return Ok(true);
    }
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    Ok(match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => all(&v[range]),
        Storage::Cpu(CpuStorage::F64(v)) => all(&v[range]),
        Storage::Cpu(CpuStorage::BF16(v)) => all(&v[range]),
        Storage::Cpu(CpuStorage::F16(v)) => all(&v[range]),
        _ => {
            drop(storage);
            // Zeros, or NaN; row by row first, since one block of a device's threads sums a whole
            // tensor.
            let rows = t.dims().first().map_or(1, |n| *n);
            let sum = (&t * 0.)?.reshape((rows, ()))?.sum(1)?.sum_all()?;
            sum.to_dtype(DType::F32)?.to_scalar::<f32>()? == 0.
        }
    })
}
