//! The merged weight `W + ΔW`, with DoRA `c ∘ (W + ΔW)`, computed in F32 (F64 beside F64) and rounded once. On the
//! CPU, ΔW is added block by block and never built.

use super::backend::{Backend, LowRankTerm};
use super::dora::scaled_weight;
use super::finite::is_finite;
use super::lora::Magnitude;
use super::op::{compute_dtype, Custom, Op};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// The contiguous `w`, seen as a matrix of shape `matrix`, plus the terms; with DoRA, each output then has
/// its magnitude, along the given dimension of `w`. Errors if a value of the result is not finite.
pub(crate) fn merge(
    w: &Tensor,
    matrix: (usize, usize),
    terms: Vec<LowRankTerm>,
    magnitude: Option<(&Magnitude, usize)>,
) -> Result<Tensor> {
    let sum = w.contiguous()?.apply_op1_no_bwd(&Custom(MergeOp { matrix, terms }))?;
    let merged = match magnitude {
        None => sum,
        Some((magnitude, dim)) => scaled_weight(&sum, magnitude, dim)?,
    };
    let merged = merged.to_dtype(w.dtype())?.detach();
    if !is_finite(&merged)? {
        bail!(
            "the merged weight {:?} in {:?} is not finite: the base or the adapter holds NaN, \
             infinite or too large values",
            merged.dims(),
            merged.dtype()
        )
    }
    Ok(merged)
}

struct MergeOp {
    matrix: (usize, usize),
    terms: Vec<LowRankTerm>,
}

impl Op<1> for MergeOp {
    const NAME: &'static str = "lora-merge";

    fn forward<S: Backend>(&self, [(w, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        // Copies also where the dtype is the same: the base is never written.
        let copy = w.to_dtype(l, compute_dtype(w.dtype()))?;
        Ok((copy.add_low_rank(self.matrix, None, &self.terms)?, l.shape().clone()))
    }
}
