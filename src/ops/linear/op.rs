//! `x·W + x̃·Aᵀ·(s·B)ᵀ + bias` as one operation, with gradients for `x`, `A` and `B` alone: W is a field, so that candle's
//! backward gives it none. It is an operand only of a layer that trains it.
//!
//! Forward computes `u = x̃·Aᵀ` (m, r) and adds `u·(s·B)ᵀ` and the bias to `x·W` while a block of rows
//! is in the cache. Backward computes `h = g·(s·B)` (m, r), then `gA = hᵀ·x̃`, `gB = s·gᵀ·u` and
//! `gx = g·Wᵀ + h·A`.

use super::matmul::matmul;
use crate::ops::backend::{Backend, LowRankTerm};
use crate::ops::dropout::Mask;
use crate::ops::elementwise::with_frozen_bias;
use crate::ops::lora::{LowRank, ScaledFactors};
use crate::ops::matrix::{gemm_layout, Matrix};
use crate::ops::op::{compute_dtype, if_tracked, Custom, Grads, Op};
use candle_core::{Layout, Result, Shape, Tensor, D};

/// `x·W`, with the update of x̃ and the bias, for a contiguous `x` of `m` rows and a mask for x̃.
pub(super) fn product(
    x: &Tensor,
    m: usize,
    w: Matrix,
    bias: Option<&Tensor>,
    update: Option<&LowRank>,
    mask: Option<Mask>,
) -> Result<Tensor> {
    with_frozen_bias(bias, |bias| {
        let linear = LinearOp { m, bias: bias.map(Tensor::detach), terms: vec![] };
        match (update, w) {
            (None, Matrix::Dense(w)) => x.apply_op2(&w, Custom(linear)),
            (None, w) => x.apply_op1(Custom(FrozenLinearOp { w, linear, a: vec![] })),
            (Some(update), w) => {
                let frozen = update.detached();
                let a = frozen.a_in_compute_dtype(x.dtype())?;
                let u = matmul(&masked(x, m, mask.as_ref())?, &a.t()?)?;
                let term = |f: ScaledFactors| {
                    let u = u.narrow(1, f.ranks.start, f.ranks.len())?.contiguous()?;
                    Ok(LowRankTerm { u, v: f.b.t()?, rows: 0..m, cols: f.outputs })
                };
                let terms = frozen.factors(x.dtype())?.into_iter().map(term);
                let linear = LinearOp { terms: terms.collect::<Result<_>>()?, ..linear };
                let scaling = update.scaling();
                let op = LoraLinearOp { w: w.detach(), linear, a, scaling, mask };
                x.apply_op3(update.a(), update.b(), Custom(op))
            }
        }
    })
}

/// x̃ as a matrix of `m` rows in the compute dtype.
pub(super) fn masked(x: &Tensor, m: usize, mask: Option<&Mask>) -> Result<Tensor> {
    let x = x.detach().to_dtype(compute_dtype(x.dtype()))?;
    let x = match mask {
        Some(mask) => mask.apply(&x)?,
        None => x,
    };
    x.reshape((m, x.dim(D::Minus1)?))
}

/// `x·W` plus low-rank terms and a bias, with `x` seen as a matrix of `m` rows.
pub(super) struct LinearOp {
    pub m: usize,
    pub bias: Option<Tensor>,
    pub terms: Vec<LowRankTerm>,
}

impl LinearOp {
    fn run<S: Backend>(
        &self,
        (x, xl): (&S, &Layout),
        (k, n): (usize, usize),
        gemm: impl FnOnce(&S, &Layout) -> Result<S>,
    ) -> Result<(S, Shape)> {
        let rows = Layout::contiguous_with_offset((self.m, k), xl.start_offset());
        let y = gemm(x, &rows)?;
        let y = y.add_low_rank((self.m, n), self.bias.as_ref(), &self.terms)?;
        let mut dims = xl.dims().to_vec();
        dims.pop();
        dims.push(n);
        let shape = dims.into();
        Ok((y.round_to(&shape, x.dtype())?, shape))
    }

    fn run_frozen<S: Backend>(&self, x: (&S, &Layout), w: &Matrix) -> Result<(S, Shape)> {
        let dims = w.dims2()?;
        match w {
            Matrix::Dense(w) => {
                let (w, wl) = w.storage_and_layout();
                self.run(x, dims, |x, xl| x.gemm(xl, S::of(&w)?, wl))
            }
            Matrix::Quantized(w) => self.run(x, dims, |x, xl| x.gemm_quantized(xl, w)),
        }
    }
}

impl Op<2> for LinearOp {
    const NAME: &'static str = "linear";

    fn forward<S: Backend>(&self, [x, (w, wl)]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        self.run(x, wl.shape().dims2()?, |x, xl| x.gemm(xl, w, wl))
    }

    fn backward(&self, [x, w]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<Grads<2>> {
        let (k, n) = w.dims2()?;
        let grad = grad.contiguous()?;
        let gx = if_tracked(x, || {
            linear_no_grad(&grad, Matrix::Dense(w.detach().t()?), self.m, vec![])
        })?;
        // candle's GEMM is faster where both operands are contiguous along the summed dimension.
        let gw = if_tracked(w, || {
            x.detach().reshape((self.m, k))?.t()?.matmul(&grad.reshape((self.m, n))?)
        })?;
        Ok([gx, gw])
    }
}

/// The operand is `x`: weight, bias and terms are frozen.
pub(super) struct FrozenLinearOp {
    pub w: Matrix,
    pub linear: LinearOp,
    /// A of each term `x·Aᵀ·(s·B)ᵀ`.
    pub a: Vec<Tensor>,
}

impl Op<1> for FrozenLinearOp {
    const NAME: &'static str = "frozen-linear";

    fn forward<S: Backend>(&self, [x]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        self.linear.run_frozen(x, &self.w)
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        let gx = || {
            let (m, (k, n), grad) = (self.linear.m, self.w.dims2()?, grad.contiguous()?);
            let back = |(term, a): (&LowRankTerm, &Tensor)| {
                let LowRankTerm { v, rows, cols, .. } = term;
                let g = grad.reshape((m, n))?.narrow(0, rows.start, rows.len())?;
                let g = masked(&g, rows.len(), None)?.narrow(1, cols.start, cols.len())?;
                let u = matmul(&gemm_layout(g)?, &v.t()?)?;
                Ok(LowRankTerm { u, v: a.clone(), rows: rows.clone(), cols: 0..k })
            };
            let terms = self.linear.terms.iter().zip(&self.a).map(back).collect::<Result<_>>()?;
            linear_no_grad(&grad, self.w.t()?, m, terms)
        };
        Ok([if_tracked(x, gx)?])
    }
}

/// `x·w` plus low-rank terms, without a graph.
pub(in crate::ops) fn linear_no_grad(
    x: &Tensor,
    w: Matrix,
    m: usize,
    terms: Vec<LowRankTerm>,
) -> Result<Tensor> {
    let linear = LinearOp { m, bias: None, terms };
    x.apply_op1_no_bwd(&Custom(FrozenLinearOp { w, linear, a: vec![] }))
}

/// The operands are `x`, `A` and `B`.
struct LoraLinearOp {
    w: Matrix,
    /// With a term for each split, of `u = x̃·Aᵀ` and `v = (s·B)ᵀ`.
    linear: LinearOp,
    /// In the compute dtype.
    a: Tensor,
    scaling: f64,
    mask: Option<Mask>,
}

impl Op<3> for LoraLinearOp {
    const NAME: &'static str = "lora-linear";

    fn forward<S: Backend>(&self, [x, ..]: [(&S, &Layout); 3]) -> Result<(S, Shape)> {
        self.linear.run_frozen(x, &self.w)
    }

    fn backward(&self, [x, a, b]: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<Grads<3>> {
        let (m, (k, n)) = (self.linear.m, self.w.dims2()?);
        let grad = grad.contiguous()?;
        let g = grad.to_dtype(compute_dtype(grad.dtype()))?.reshape((m, n))?;
        let (mut h, mut gb) = (vec![], vec![]);
        for LowRankTerm { u, v, cols, .. } in &self.linear.terms {
            let g = gemm_layout(g.narrow(1, cols.start, cols.len())?)?;
            h.push(matmul(&g, &v.t()?)?);
            // The scaling is applied to the small result.
            gb.push((matmul(&g.t()?, u)? * self.scaling)?);
        }
        let (h, gb) = (concat(h, 1)?, concat(gb, 0)?);
        let ga = if_tracked(a, || {
            matmul(&h.t()?, &masked(x, m, self.mask.as_ref())?)?.to_dtype(a.dtype())
        })?;
        let gb = if_tracked(b, || gb.to_dtype(b.dtype()))?;
        let gx = if_tracked(x, || {
            let wt = self.w.t()?;
            match &self.mask {
                None => {
                    let term = LowRankTerm { u: h, v: self.a.clone(), rows: 0..m, cols: 0..k };
                    linear_no_grad(&grad, wt, m, vec![term])
                }
                Some(mask) => {
                    let through = mask.apply(&matmul(&h, &self.a)?.reshape(x.shape())?)?;
                    linear_no_grad(&grad, wt, m, vec![])? + through.to_dtype(x.dtype())?
                }
            }
        })?;
        Ok([gx, ga, gb])
    }
}

fn concat(mut tensors: Vec<Tensor>, dim: usize) -> Result<Tensor> {
    match tensors.len() {
        1 => Ok(tensors.remove(0)),
        _ => Tensor::cat(&tensors, dim),
    }
}
