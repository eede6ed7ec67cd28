//! The low-rank update of a weight, `ΔW = scaling · B·A`, in one part or several.

use crate::ops::{wide, Term};
use crate::LoraConfig;
use candle_core::{bail, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use std::ops::Range;
use std::sync::Arc;

/// Consecutive outputs of the layer that `ranks` of A and as many rows of B feed.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub out: Range<usize>,
    pub ranks: Range<usize>,
    pub b_rows: Range<usize>,
}

/// `scaling · B·A` for one part.
pub(crate) struct Factor {
    pub out: Range<usize>,
    pub ranks: Range<usize>,
    /// `scaling · B` (outputs, rank)
    pub b: Tensor,
    /// (rank, in)
    pub a: Tensor,
}

#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    a: Tensor,
    b: Tensor,
    scaling: f64,
    dropout: f32,
    parts: Arc<[Part]>,
}

/// How A and B start: one of them at zero, so that a fresh update is none.
pub(crate) enum Start {
    /// A ~ U(±1/√columns), B = 0
    UniformA,
    /// A = 0, B ~ N(0, 1): a rare token's column of A stays sparse (microsoft/LoRA #14)
    NormalB,
}

/// The product of some sizes, or an error where it is no size at all.
pub(crate) fn checked(sizes: &[usize]) -> Result<usize> {
    let product = sizes.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    match product.filter(|product| isize::try_from(*product).is_ok()) {
        Some(product) => Ok(product),
        None => bail!("a tensor of sizes {sizes:?} is too large"),
    }
}

impl LowRank {
    /// An update in one part.
    pub fn new(
        (ranks, columns): (usize, usize),
        rows: usize,
        start: Start,
        cfg: &LoraConfig,
        base: DType,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let part = Part { out: 0..rows, ranks: 0..ranks, b_rows: 0..rows };
        Self::in_parts((ranks, columns), (rows, ranks), vec![part], start, cfg, base, vb)
    }

    pub fn in_parts(
        a_shape: (usize, usize),
        b_shape: (usize, usize),
        parts: Vec<Part>,
        start: Start,
        cfg: &LoraConfig,
        base: DType,
        vb: &VarBuilder,
    ) -> Result<Self> {
        for (rows, columns) in [a_shape, b_shape] {
            // In bytes, and more than there are.
            checked(&[rows, columns, 16])?;
        }
        let dtype = cfg.adapter_dtype(base);
        let (a_init, b_init) = match start {
            Start::UniformA => {
                let bound = 1. / (a_shape.1 as f64).sqrt();
                (Init::Uniform { lo: -bound, up: bound }, Init::Const(0.))
            }
            Start::NormalB => (Init::Const(0.), Init::Randn { mean: 0., stdev: 1. }),
        };
        Ok(Self {
            a: vb.get_with_hints_dtype(a_shape, "lora_A", a_init, dtype)?,
            b: vb.get_with_hints_dtype(b_shape, "lora_B", b_init, dtype)?,
            scaling: cfg.scaling(),
            dropout: cfg.lora_dropout,
            parts: parts.into(),
        })
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

    pub fn dropout(&self) -> f32 {
        self.dropout
    }

    /// The same update for evaluation: without dropout and without a graph.
    pub fn frozen(&self) -> Self {
        Self { a: self.a.detach(), b: self.b.detach(), dropout: 0., ..self.clone() }
    }

    /// A in the dtype of low-rank products beside a base of dtype `base`, contiguous.
    pub fn wide_a(&self, base: DType) -> Result<Tensor> {
        self.a.to_dtype(wide(base))?.contiguous()
    }

    /// Each part's `scaling · B` and `A`, in the dtype of low-rank products.
    pub fn factors(&self, base: DType) -> Result<Vec<Factor>> {
        let a = self.wide_a(base)?;
        let b = (self.b.to_dtype(wide(base))? * self.scaling)?;
        self.parts
            .iter()
            .map(|p| {
                Ok(Factor {
                    out: p.out.clone(),
                    ranks: p.ranks.clone(),
                    b: b.narrow(0, p.b_rows.start, p.b_rows.len())?,
                    a: a.narrow(0, p.ranks.start, p.ranks.len())?,
                })
            })
            .collect()
    }

    /// ΔW as terms to add to a matrix (outputs, inputs), or to its transpose.
    pub fn terms(
        &self,
        base: DType,
        (rows, cols): (usize, usize),
        transposed: bool,
    ) -> Result<Vec<Term>> {
        let terms = self.frozen().factors(base)?.into_iter().map(|f| {
            Ok(if transposed {
                Term { u: f.a.t()?, v: f.b.t()?, rows: 0..rows, cols: f.out }
            } else {
                Term { u: f.b, v: f.a, rows: f.out, cols: 0..cols }
            })
        });
        terms.collect()
    }
}
