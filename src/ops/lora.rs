//! The low-rank update of a weight, `ΔW = scaling · B·A`, for all of its outputs or for several splits
//! of them: dense, as factors, and as terms of a sum.

use super::backend::LowRankTerm;
use super::dropout::{Dropout, DropoutStream};
use super::op::compute_dtype;
use super::place::is_fused;
use candle_core::{bail, DType, Result, Tensor};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

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

/// DoRA's magnitude: the length of each output's row of the effective weight.
#[derive(Debug, Clone)]
pub(crate) struct Magnitude {
    /// (out)
    pub m: Tensor,
    /// ‖w‖² of each output of the base (out), in the compute dtype. `None` for a variable, whose values may change.
    pub base_squares: Option<Tensor>,
    /// The norms of a snapshot over a frozen base, after the first forward.
    pub norms: Option<Arc<OnceLock<Tensor>>>,
}

/// A and B of an update `B·A − B₀·A₀`, each of twice the rank: A over A₀, and B beside −B₀.
pub(crate) fn joined([a, b]: [&Tensor; 2], [a0, b0]: [&Tensor; 2]) -> Result<[Tensor; 2]> {
    Ok([Tensor::cat(&[a, a0], 0)?, Tensor::cat(&[b, &b0.neg()?], 1)?])
}

/// Factors A and B, their scaling, the dropout of the update's input, and with DoRA the magnitude.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    a: Tensor,
    b: Tensor,
    scaling: f64,
    dropout: Dropout,
    splits: Arc<[Split]>,
    magnitude: Option<Magnitude>,
    /// A₀ and B₀, whose product is subtracted from B·A. The update has a single split then.
    initial: Option<[Tensor; 2]>,
    /// The kernels that A and B are matrices of, if they are.
    kernels: Option<[Tensor; 2]>,
}

impl LowRank {
    pub fn new(a: Tensor, b: Tensor, scaling: f64, p: f32, splits: Vec<Split>) -> Self {
        let dropout = Dropout { p, stream: None };
        let (magnitude, initial, kernels) = (None, None, None);
        Self { a, b, scaling, dropout, splits: splits.into(), magnitude, initial, kernels }
    }

    /// The same update, whose A (r, in·kⁿ) and B (out, r) are those of the kernels (r, in, k..) and (out, r, 1..).
    fn of_kernels(self, kernels: [Tensor; 2]) -> Result<Self> {
        let [a, b] = &kernels;
        Ok(Self { a: a.flatten_from(1)?, b: b.flatten_from(1)?, kernels: Some(kernels), ..self })
    }

    /// The update of a convolution by two others, of the kernels (r, in, k..) and (out, r, 1..).
    pub fn kernels(a: Tensor, b: Tensor, scaling: f64, p: f32) -> Result<Self> {
        let (rows, ranks) = (0..b.dim(0)?, 0..a.dim(0)?);
        let split = Split { outputs: rows.clone(), ranks, b_rows: rows };
        Self::new(a.clone(), b.clone(), scaling, p, vec![split]).of_kernels([a, b])
    }

    /// The dimensions of A's kernels, if it has some: (in, k..).
    pub fn kernel_dims(&self) -> Option<&[usize]> {
        self.kernels.as_ref().map(|[a, _]| &a.dims()[1..])
    }

    /// `lora_A` and `lora_B` as they are trained.
    pub fn trained(&self) -> [&Tensor; 2] {
        self.kernels.as_ref().map_or([&self.a, &self.b], |[a, b]| [a, b])
    }

    pub fn a(&self) -> &Tensor {
        &self.a
    }

    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// A, B and the magnitude.
    pub fn variables(&self) -> impl Iterator<Item = &Tensor> {
        self.trained().into_iter().chain(self.magnitude.as_ref().map(|magnitude| &magnitude.m))
    }

    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    pub fn dropout(&self) -> &Dropout {
        &self.dropout
    }

    /// DoRA's magnitude, if the update has one.
    pub fn magnitude(&self) -> Option<&Magnitude> {
        self.magnitude.as_ref()
    }

    pub fn with_magnitude(self, magnitude: Magnitude) -> Self {
        Self { magnitude: Some(magnitude), ..self }
    }

    /// A₀ and B₀.
    pub fn initial(&self) -> Option<&[Tensor; 2]> {
        self.initial.as_ref()
    }

    /// Subtracts the product of these frozen factors, A₀ and B₀.
    pub fn with_initial(self, [a0, b0]: [Tensor; 2]) -> Self {
        Self { initial: Some([a0.detach(), b0.detach()]), ..self }
    }

    /// The update of some of the outputs, without dropout.
    pub fn outputs(&self, outputs: Range<usize>) -> Result<Self> {
        let b = self.b.narrow(0, outputs.start, outputs.len())?;
        let rows = 0..outputs.len();
        let split = Split { outputs: rows.clone(), ranks: 0..self.a.dim(0)?, b_rows: rows };
        Ok(Self::new(self.a.clone(), b, self.scaling, 0., vec![split]))
    }

    /// The update of the transposed weight, without dropout.
    pub fn transposed(&self) -> Result<Self> {
        let (a, b) = (self.b.t()?, self.a.t()?);
        let rows = 0..b.dim(0)?;
        let split = Split { outputs: rows.clone(), ranks: 0..a.dim(0)?, b_rows: rows };
        Ok(Self::new(a, b, self.scaling, 0., vec![split]))
    }

    /// The same update with the initial factors in A and B, for computing with it.
    pub fn joined(&self) -> Result<Cow<'_, Self>> {
        let Some([a0, b0]) = &self.initial else { return Ok(Cow::Borrowed(self)) };
        let [a, b] = joined([&self.a, &self.b], [a0, b0])?;
        let rows = 0..b.dim(0)?;
        let split = Split { outputs: rows.clone(), ranks: 0..a.dim(0)?, b_rows: rows };
        Ok(Cow::Owned(Self { a, b, splits: [split].into(), initial: None, ..self.clone() }))
    }

    /// The same update with masks from a stream.
    pub fn with_dropout_stream(self, stream: Arc<DropoutStream>) -> Self {
        Self { dropout: Dropout { stream: Some(stream), ..self.dropout }, ..self }
    }

    /// The same update for evaluation: without dropout and without a graph.
    pub fn detached(&self) -> Self {
        let (a, b, dropout) = (self.a.detach(), self.b.detach(), Dropout::default());
        let detached = |magnitude: Magnitude| Magnitude { m: magnitude.m.detach(), ..magnitude };
        let kernels = self.kernels.as_ref().map(|kernels| kernels.each_ref().map(Tensor::detach));
        let magnitude = self.magnitude.clone().map(detached);
        Self { a, b, dropout, magnitude, kernels, ..self.clone() }
    }

    /// The same update over copies of its variables, to which their gradients lead. candle locks a tensor while an
    /// operation reads it. A thread of a pool that waits for a part of the operation may run a task that writes the
    /// variable, as an optimizer's step, or that reads it behind a waiting writer: it would wait for itself.
    pub fn copied(&self) -> Result<Self> {
        let copied = |t: &Tensor| match t.is_variable() && is_fused(t.device()) {
            true => t.copy(),
            false => Ok(t.clone()),
        };
        let magnitude = match &self.magnitude {
            Some(magnitude) => Some(Magnitude { m: copied(&magnitude.m)?, ..magnitude.clone() }),
            None => None,
        };
        let [a, b] = self.trained();
        let (a, b) = (copied(a)?, copied(b)?);
        let update = Self { magnitude, ..self.clone() };
        match self.kernels {
            Some(_) => update.of_kernels([a, b]),
            None => Ok(Self { a, b, ..update }),
        }
    }

    /// A copy of the present values for evaluation: joined, and with norms that are computed once.
    pub fn snapshot(&self) -> Result<Self> {
        let own = self.joined()?;
        let copy = |t: &Tensor| t.copy().map(|copy| copy.detach());
        let magnitude = |magnitude: &Magnitude| {
            let m = copy(&magnitude.m)?;
            let norms = magnitude.base_squares.as_ref().map(|_| Arc::default());
            Ok::<_, candle_core::Error>(Magnitude { m, norms, ..magnitude.clone() })
        };
        Ok(Self {
            a: copy(&own.a)?,
            b: copy(&own.b)?,
            dropout: Dropout::default(),
            magnitude: own.magnitude.as_ref().map(magnitude).transpose()?,
            ..own.into_owned()
        })
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

    /// ΔW of an update with a single split, dense, beside a base of dtype `base`.
    pub fn delta(&self, base: DType) -> Result<Tensor> {
        let factor = self.factors(base)?.remove(0);
        factor.b.matmul(&factor.a)
    }

    /// ΔW as terms to add to a matrix (outputs, inputs), or with `transposed` to (inputs, outputs).
    pub fn terms(
        &self,
        base: DType,
        (rows, cols): (usize, usize),
        transposed: bool,
    ) -> Result<Vec<LowRankTerm>> {
        let terms = self.joined()?.detached().factors(base)?.into_iter().map(|f| {
            Ok(if transposed {
                LowRankTerm { u: f.a.t()?, v: f.b.t()?, rows: 0..rows, cols: f.outputs }
            } else {
                LowRankTerm { u: f.b, v: f.a, rows: f.outputs, cols: 0..cols }
            })
        });
        terms.collect()
    }
}

/// The sum of updates, each times a strength, as one update: `[s₁B₁ s₂B₂]·[A₁; A₂] = s₁B₁·A₁ + s₂B₂·A₂`. It has no
/// dropout.
pub(crate) fn weighted_sum(updates: &[(LowRank, f64)]) -> Result<LowRank> {
    let (mut all_a, mut all_b, mut rows) = (vec![], vec![], 0);
    let of_kernels = |update: &LowRank| update.kernels.is_some();
    if updates.iter().any(|(update, _)| of_kernels(update) != of_kernels(&updates[0].0)) {
        bail!(
            "the factors of this convolution have PEFT's shapes in one adapter and loralib's in another: sum them by \
             `merge::add_weighted`"
        )
    }
    for (update, strength) in updates {
        let update = update.joined()?;
        for f in update.factors(update.a().dtype())? {
            rows = rows.max(f.outputs.end);
            all_a.push(f.a);
            all_b.push(((f.b * *strength)?, f.outputs));
        }
    }
    let padded = |(b, outputs): (Tensor, Range<usize>)| {
        b.pad_with_zeros(0, outputs.start, rows - outputs.end)
    };
    let b = Tensor::cat(&all_b.into_iter().map(padded).collect::<Result<Vec<_>>>()?, 1)?;
    let split = Split { outputs: 0..rows, ranks: 0..b.dim(1)?, b_rows: 0..rows };
    let a = Tensor::cat(&all_a, 0)?;
    let sum = LowRank::new(a.clone(), b.clone(), 1., 0., vec![split]);
    let Some(kernel) = updates.first().and_then(|(update, _)| update.kernel_dims()) else {
        return Ok(sum);
    };
    let ones = vec![1; kernel.len() - 1];
    let a = a.reshape([&[a.dim(0)?], kernel].concat())?;
    let b = b.reshape([b.dims(), &ones].concat())?;
    sum.of_kernels([a, b])
}
