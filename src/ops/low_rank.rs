//! The low-rank update of a weight, `ΔW = scaling · B·A`, for all of its outputs or for several splits
//! of them.

use super::dropout::{Dropout, DropoutStream};
use candle_core::{DType, Result, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// The dtype in which low-rank terms are computed beside a base of `dtype`: F64 for F64, else F32.
pub(crate) fn compute_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// A rank-k term of a sum: `y[rows, cols] += u·v`, with `u` (rows, k) and `v` (k, cols).
#[derive(Debug, Clone)]
pub(crate) struct LowRankTerm {
    pub u: Tensor,
    pub v: Tensor,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl LowRankTerm {
    /// k
    pub fn rank(&self) -> usize {
        self.u.layout().dims()[1]
    }
}

/// Consecutive outputs of a layer, with their ranks (rows of A) and their rows of B.
#[derive(Debug, Clone)]
pub(crate) struct Split {
    pub outputs: Range<usize>,
    pub ranks: Range<usize>,
    pub b_rows: Range<usize>,
}

/// The factors of one split, in the compute dtype.
pub(crate) struct ScaledFactors {
    pub outputs: Range<usize>,
    pub ranks: Range<usize>,
    /// `scaling · B` (outputs, rank)
    pub b: Tensor,
    /// (rank, inputs)
    pub a: Tensor,
}

/// Factors A and B, their scaling, and the dropout of the update's input.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    a: Tensor,
    b: Tensor,
    scaling: f64,
    dropout: Dropout,
    splits: Arc<[Split]>,
}

impl LowRank {
    pub fn new(a: Tensor, b: Tensor, scaling: f64, p: f32, splits: Vec<Split>) -> Self {
        let dropout = Dropout { p, stream: None };
        Self { a, b, scaling, dropout, splits: splits.into() }
    }

    pub fn a(&self) -> &Tensor {
        &self.a
    }

    pub fn b(&self) -> &Tensor {
        &self.b
    }

    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    pub fn dropout(&self) -> &Dropout {
        &self.dropout
    }

    /// The same update with masks from a stream.
    pub fn with_dropout_stream(self, stream: Arc<DropoutStream>) -> Self {
        Self { dropout: Dropout { stream: Some(stream), ..self.dropout }, ..self }
    }

    /// The same update for evaluation: without dropout and without a graph.
    pub fn detached(&self) -> Self {
        Self { a: self.a.detach(), b: self.b.detach(), dropout: Dropout::default(), ..self.clone() }
    }

    /// A, contiguous, in the compute dtype beside a base of dtype `base`.
    pub fn a_in_compute_dtype(&self, base: DType) -> Result<Tensor> {
        self.a.to_dtype(compute_dtype(base))?.contiguous()
    }

    /// The factors of each split, beside a base of dtype `base`.
    pub fn factors(&self, base: DType) -> Result<Vec<ScaledFactors>> {
        let a = self.a_in_compute_dtype(base)?;
        let b = (self.b.to_dtype(compute_dtype(base))? * self.scaling)?;
        self.splits
            .iter()
            .map(|split| {
                Ok(ScaledFactors {
                    outputs: split.outputs.clone(),
                    ranks: split.ranks.clone(),
                    b: b.narrow(0, split.b_rows.start, split.b_rows.len())?,
                    a: a.narrow(0, split.ranks.start, split.ranks.len())?,
                })
            })
            .collect()
    }

    /// ΔW as terms to add to a matrix (outputs, inputs), or with `transposed` to (inputs, outputs).
    pub fn terms(
        &self,
        base: DType,
        (rows, cols): (usize, usize),
        transposed: bool,
    ) -> Result<Vec<LowRankTerm>> {
        let terms = self.detached().factors(base)?.into_iter().map(|f| {
            Ok(if transposed {
                LowRankTerm { u: f.a.t()?, v: f.b.t()?, rows: 0..rows, cols: f.outputs }
            } else {
                LowRankTerm { u: f.b, v: f.a, rows: f.outputs, cols: 0..cols }
            })
        });
        terms.collect()
    }
}
