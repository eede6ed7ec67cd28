//! `y = x·W + bias`, plus for the rows of each group `x·Aᵀ·(s·B)ᵀ` with factors of their own: one product with the
//! weight for a batch whose rows have different adapters.

use super::backend::Backend;
use super::linear::{checked, linear};
use super::linear_op::{gemm_layout, gemm_operand, linear_no_grad, masked, LinearOp};
use super::low_rank::{LowRank, LowRankTerm};
use super::matmul::matmul;
use super::matrix::Matrix;
use super::op::{if_tracked, Custom, Op};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// `x` (rows, .., in) to (rows, .., out), with `w` (in, out) and `bias` (out) frozen. The groups are consecutive
/// rows: their number and their update, which is detached and without dropout.
pub(crate) fn linear_rows(
    x: &Tensor,
    w: &Matrix,
    bias: Option<&Tensor>,
    groups: &[(usize, Option<LowRank>)],
) -> Result<Tensor> {
    let (leading, m) = checked(x, w, bias)?;
    let rows: usize = groups.iter().map(|(n, _)| n).sum();
    if leading.first() != Some(&rows) {
        bail!(
            "linear: the input is {:?}, expected ({rows}, ..): each row has its adapter",
            x.dims()
        )
    }
    if m == 0 {
        return linear(x, w, bias, None);
    }
    let (x, dtype) = (x.contiguous()?, w.dtype());
    let input = masked(&x, m, None)?;
    let (mut terms, mut factors, mut start) = (vec![], vec![], 0);
    for (n, update) in groups {
        let group = start..start + n * (m / rows);
        start = group.end;
        let Some(update) = update else { continue };
        let input = input.narrow(0, group.start, group.len())?;
        for f in update.joined()?.factors(dtype)? {
            let u = matmul(&input, &f.a.t()?)?;
            terms.push(LowRankTerm { u, v: f.b.t()?, rows: group.clone(), cols: f.outputs });
            factors.push(f.a);
        }
    }
    let linear = LinearOp { m, bias: bias.map(Tensor::detach), terms };
    x.apply_op1(Custom(RowsOp { w: gemm_operand(w)?.detach(), linear, a: factors }))
}

/// The operand is `x`: the weight and the factors are fields.
struct RowsOp {
    w: Matrix,
    linear: LinearOp,
    /// A of each term.
    a: Vec<Tensor>,
}

impl Op<1> for RowsOp {
    const NAME: &'static str = "linear-rows";

    fn forward<S: Backend>(&self, [x]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        self.linear.run_frozen(x, &self.w)
    }

    fn backward(
        &self,
        [x]: [&Tensor; 1],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let gx = if_tracked(x, || {
            let (m, (k, _)) = (self.linear.m, self.w.dims2()?);
            let grad = grad.contiguous()?;
            let g = masked(&grad, m, None)?;
            let back = |(term, a): (&LowRankTerm, &Tensor)| {
                let LowRankTerm { v, rows, cols, .. } = term;
                let g = g.narrow(0, rows.start, rows.len())?.narrow(1, cols.start, cols.len())?;
                let u = matmul(&gemm_layout(g)?, &v.t()?)?;
                Ok(LowRankTerm { u, v: a.clone(), rows: rows.clone(), cols: 0..k })
            };
            let terms = self.linear.terms.iter().zip(&self.a).map(back);
            linear_no_grad(&grad, self.w.t()?, m, terms.collect::<Result<_>>()?)
        })?;
        Ok([gx])
    }
}
