//! `y = x·W + x̃·Aᵀ·(s·B)ᵀ + bias`, with x̃ = dropout(x): the product with a weight, which may be quantised, and
//! its low-rank update. With DoRA `y = c ∘ (x̃·W + x̃·Aᵀ·(s·B)ᵀ) + (x − x̃)·W + bias`, as in PEFT.
//!
//! [`linear`] and [`linear_rows`] check the operands and choose the products: one, or two where a part of the input has
//! no dropout. [`product()`] is an operation for each case of what is trained, with its forward and backward (`op`), and
//! [`matmul()`] the small products of these, without a graph.

pub(super) mod matmul;
pub(super) mod op;

use super::backend::LowRankTerm;
use super::custom_gradient::with_zero_grads;
use super::dora;
use super::elementwise::{add, plus_bias};
use super::lora::{LowRank, Magnitude};
use super::matrix::Matrix;
use super::op::{compute_dtype, Custom};
use candle_core::{bail, Result, Tensor};
use matmul::matmul;
use op::{masked, product, FrozenLinearOp, LinearOp};
use std::iter;

/// `x` (.., in) to (.., out), with `w` (in, out) in any layout and `bias` (out).
///
/// With an update `w` is frozen, as a quantised one always is. Without one this is a linear layer that
/// computes a gradient only for operands that lead to a variable.
pub(crate) fn linear(
    x: &Tensor,
    w: &Matrix,
    bias: Option<&Tensor>,
    update: Option<&LowRank>,
) -> Result<Tensor> {
    let (leading, m) = checked(x, w, bias)?;
    let (k, n) = w.dims2()?;
    if m == 0 || k == 0 {
        // Some backends refuse empty products.
        let y = Tensor::zeros([leading, &[n]].concat(), x.dtype(), x.device())?;
        let weight = w.dense().filter(|_| update.is_none());
        let variables = update.into_iter().flat_map(LowRank::variables);
        return plus_bias(with_zero_grads(y, iter::once(x).chain(weight).chain(variables))?, bias);
    }
    let (x, w) = (x.contiguous()?, w.gemm_operand()?);
    let Some(update) = update else { return product(&x, m, w, bias, None, None) };
    if let Some(magnitude) = update.magnitude() {
        return with_magnitude(&x, m, w, bias, update, magnitude);
    }
    match update.dropout().mask(&x)? {
        None => product(&x, m, w, bias, Some(&*update.joined()?), None),
        mask => {
            let y = product(&x, m, w, bias, Some(update), mask)?;
            add_initial(y, &x, m, update)
        }
    }
}

/// Adds `−x·A₀ᵀ·(s·B₀)ᵀ` for an update with initial factors: these belong to W, so that dropout leaves their input
/// as it is.
fn add_initial(y: Tensor, x: &Tensor, m: usize, update: &LowRank) -> Result<Tensor> {
    let Some([a0, b0]) = update.initial() else { return Ok(y) };
    let dtype = compute_dtype(x.dtype());
    let by = |x: &Tensor, w: Tensor| {
        let w = Matrix::Dense(w.to_dtype(dtype)?.t()?).gemm_operand()?;
        product(x, m, w, None, None, None)
    };
    let initial = by(&by(&x.to_dtype(dtype)?, a0.clone())?, (b0 * -update.scaling())?)?;
    add(&y.to_dtype(dtype)?, &initial)?.to_dtype(x.dtype())
}

fn with_magnitude(
    x: &Tensor,
    m: usize,
    w: Matrix,
    bias: Option<&Tensor>,
    update: &LowRank,
    magnitude: &Magnitude,
) -> Result<Tensor> {
    let joined = &*update.joined()?;
    let norms = dora::norms(&w, joined, magnitude)?;
    let scaled = |x: &Tensor, bias| {
        let y = product(x, m, w.clone(), None, Some(joined), None)?;
        dora::scaled(&y, magnitude, &norms, bias)
    };
    match update.dropout().mask(x)? {
        None => scaled(x, bias),
        Some(mask) => {
            let (kept, rest) = mask.split(x)?;
            let y = product(&rest, m, w.clone(), bias, None, None)?;
            add(&scaled(&kept, None)?, &add_initial(y, &rest, m, update)?)
        }
    }
}

/// [`linear`] for a batch whose rows have different updates, by one product with the weight: `x` (rows, .., in) to
/// (rows, .., out), with `w` (in, out) and `bias` (out) frozen. A group is a number of consecutive rows with their update,
/// which is detached and without dropout.
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
    x.apply_op1(Custom(FrozenLinearOp { w: w.gemm_operand()?.detach(), linear, a: factors }))
}

/// The leading dimensions of `x` and their product, if the operands fit.
fn checked<'a>(x: &'a Tensor, w: &Matrix, bias: Option<&Tensor>) -> Result<(&'a [usize], usize)> {
    let (k, n) = w.dims2()?;
    let Some((&last, leading)) = x.dims().split_last() else {
        bail!("linear: the input is a scalar, expected (.., in_features = {k})")
    };
    if last != k {
        bail!("linear: the input is {:?}, expected (.., in_features = {k})", x.dims())
    }
    if x.dtype() != w.dtype() {
        bail!("linear: the input is {:?} and the weight {:?}", x.dtype(), w.dtype())
    }
    let fits = |b: &Tensor| {
        b.dims() == [n] && b.dtype() == w.dtype() && b.device().same_device(&w.device())
    };
    if let Some(b) = bias.filter(|b| !fits(b)) {
        bail!("linear: the bias is {b:?}, expected {n} values beside {w:?}")
    }
    Ok((leading, leading.iter().product()))
}
