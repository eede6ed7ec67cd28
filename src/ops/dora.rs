//! DoRA, the weight-decomposed update: `c ∘ (W + ΔW)` with `c = m/‖W + ΔW‖` for each output, in which
//! the magnitude m is trained and the norm has no gradient ([Liu et al. 2024](https://arxiv.org/abs/2402.09353)).

use super::backend::Backend;
use super::cpu::{map_rows, map_tensor_rows, on_cpu, row_squares, sum_of_products};
use super::elementwise::{div_frozen, plus_bias, with_frozen_bias};
use super::linear::matmul::matmul;
use super::linear::op::linear_no_grad;
use super::lora::{LowRank, Magnitude};
use super::matrix::Matrix;
use super::norm::sum_rows;
use super::op::{compute_dtype, if_tracked, is_f32_on_cpu, operand, run, Fused, Grads, Operand};
use super::place::is_fused;
use candle_core::backend::BackendStorage;
use candle_core::op::Div;
use candle_core::{CpuStorage, DType, Layout, Result, Shape, Tensor};
use std::ops::Range;

/// Values that are squared at a time.
const PART: usize = 1 << 20;

/// The least share of the base's squares in which those of W + ΔW keep their digits as a difference.
const LEAST: f64 = 0.1;

/// ‖w‖² of each output of a dense weight whose outputs are the dimension `dim`, 0 or 1, in the compute dtype.
pub(crate) fn squares(w: &Tensor, dim: usize) -> Result<Tensor> {
    let w = w.detach().flatten_from(1)?;
    let parts =
        in_parts(&w, |part, _| match dim == 0 && is_f32_on_cpu(&part) && part.is_contiguous() {
            true => on_cpu([&part], |[part]| row_squares(part)),
            false => part.sqr()?.sum(1 - dim),
        })?;
    match dim {
        0 => Tensor::cat(&parts, 0),
        _ => Tensor::stack(&parts, 0)?.sum(0),
    }
}

/// Calls `f` for some rows of `w` at a time, in the compute dtype, with their range.
fn in_parts(w: &Tensor, f: impl Fn(Tensor, Range<usize>) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let (rows, columns) = w.dims2()?;
    let step = (PART / columns.max(1)).max(1);
    let part = |from: usize| {
        let len = step.min(rows - from);
        let part = w.narrow(0, from, len)?.to_dtype(compute_dtype(w.dtype()))?;
        f(part, from..from + len)
    };
    (0..rows).step_by(step).map(part).collect()
}

/// `c ∘ w` of the dense `w = W + ΔW` in the compute dtype, with gradients for `w` and m.
pub(crate) fn scaled_weight(w: &Tensor, magnitude: &Magnitude, dim: usize) -> Result<Tensor> {
    let scale = div_frozen(&magnitude.m.to_dtype(w.dtype())?, &squares(w, dim)?.sqrt()?)?;
    let ones = vec![1; w.rank() - dim - 1];
    w.broadcast_mul(&scale.reshape([scale.dims(), &ones].concat())?)
}

/// ‖W + ΔW‖ of each output of `w` (in, out), without ΔW: `‖w + s·b·A‖² = ‖w‖² + s·b·(2·A·w + s·A·Aᵀ·b)`.
pub(super) fn norms(w: &Matrix, update: &LowRank, magnitude: &Magnitude) -> Result<Tensor> {
    let Some(kept) = &magnitude.norms else { return computed_norms(w, update, magnitude) };
    if let Some(norms) = kept.get() {
        return Ok(norms.clone());
    }
    let norms = computed_norms(w, update, magnitude)?;
    Ok(kept.get_or_init(|| norms).clone())
}

fn computed_norms(w: &Matrix, update: &LowRank, magnitude: &Magnitude) -> Result<Tensor> {
    let base_squares = match (&magnitude.base_squares, w) {
        (Some(base_squares), _) => base_squares.clone(),
        // In the stored layout, so that the sum has the same order as in a new layer.
        (None, Matrix::Dense(w)) if w.is_contiguous() => squares(w, 1)?,
        (None, Matrix::Dense(w)) => squares(&w.t()?, 0)?,
        (None, Matrix::Quantized(w)) => squares(&w.dequantize()?, 1)?,
    };
    let factor = update.detached().factors(w.dtype())?.remove(0);
    let (a, b) = (factor.a.to_dtype(w.dtype())?, factor.b.contiguous()?);
    // (out, r)
    let w_a = match w.detach() {
        Matrix::Dense(w) => matmul(&w.t()?, &a.t()?)?,
        quantized => linear_no_grad(&a, quantized, a.dim(0)?, vec![])?.t()?,
    };
    let a_a = matmul(&factor.a, &factor.a.t()?)?;
    let added = (&b * ((w_a.to_dtype(b.dtype())? * 2.)? + matmul(&b, &a_a)?)?)?;
    let squares = (&base_squares + added.sum(1)?)?;
    // On a device this would wait for it.
    if is_fused(&w.device()) && cancels(&squares, &base_squares)? {
        return dense_squares(w, &factor.a, &b)?.sqrt();
    }
    squares.sqrt()
}

/// Whether an update takes away most of an output.
fn cancels(squares: &Tensor, base_squares: &Tensor) -> Result<bool> {
    Ok(squares.lt(&(base_squares * LEAST)?)?.max_all()?.to_scalar::<u8>()? > 0)
}

/// `‖w + b·A‖²` of each output of `w` (in, out), from rows of the sum.
fn dense_squares(w: &Matrix, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let w = match w {
        Matrix::Dense(w) => w.detach().t()?,
        Matrix::Quantized(w) => w.dequantize()?.t()?,
    };
    let of_rows = |part: Tensor, rows: Range<usize>| {
        (part + matmul(&b.narrow(0, rows.start, rows.len())?, a)?)?.sqr()?.sum(1)
    };
    Tensor::cat(&in_parts(&w, of_rows)?, 0)
}

/// `m/norms ∘ x + bias` of `x` (.., out), with gradients for `x`, m and the bias.
pub(super) fn scaled(
    x: &Tensor,
    magnitude: &Magnitude,
    norms: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let m = magnitude.m.to_dtype(norms.dtype())?;
    with_frozen_bias(bias, |bias| {
        run(ScaleOp { norms: norms.clone(), bias: bias.map(Tensor::detach) }, [x, &m])
    })
}

/// The arguments are `x` and m.
struct ScaleOp {
    /// (out)
    norms: Tensor,
    bias: Option<Tensor>,
}

impl Fused<2> for ScaleOp {
    const NAME: &'static str = "dora-scale";

    fn forward(&self, [x, (m, ml)]: [Operand; 2]) -> Result<(CpuStorage, Shape)> {
        let (norms, nl) = self.norms.storage_and_layout();
        let scale = m.binary_impl::<Div>(CpuStorage::of(&norms)?, ml, nl)?;
        let bias = match &self.bias {
            Some(bias) => bias.to_dtype(DType::F32)?,
            None => self.norms.zeros_like()?,
        };
        let (bias, bl) = bias.storage_and_layout();
        map_rows(
            [x, (&scale, &Layout::contiguous(ml.shape())), (CpuStorage::of(&bias)?, bl)],
            #[inline(always)]
            |_, [x, scale, bias], y| {
                for (((y, x), scale), bias) in y.iter_mut().zip(x).zip(scale).zip(bias) {
                    *y = x * scale + bias;
                }
            },
        )
    }

    fn backward(&self, [x, m]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<Grads<2>> {
        let gx = if_tracked(x, || {
            map_tensor_rows(
                [grad, &(m.detach() / &self.norms)?],
                #[inline(always)]
                |_, [g, scale], gx| {
                    gx.iter_mut().zip(g).zip(scale).for_each(|((gx, g), scale)| *gx = g * scale);
                },
            )
        })?;
        let gm =
            if_tracked(m, || sum_of_products([grad, &operand(x, DType::F32)?])? / &self.norms)?;
        Ok([gx, gm])
    }

    fn composed(&self, [x, m]: [&Tensor; 2]) -> Result<Tensor> {
        let scale = (m / &self.norms)?;
        let y = x.to_dtype(scale.dtype())?.broadcast_mul(&scale)?.to_dtype(x.dtype())?;
        plus_bias(y, self.bias.as_ref())
    }

    fn composed_backward(
        &self,
        [x, m]: [&Tensor; 2],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<Grads<2>> {
        let g = grad.to_dtype(self.norms.dtype())?;
        let gx = if_tracked(x, || g.broadcast_mul(&(m.detach() / &self.norms)?))?;
        let gm = if_tracked(m, || {
            let product = (&g * operand(x, g.dtype())?)?;
            sum_rows(&product)? / &self.norms
        })?;
        Ok([gx, gm])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::lora::Split;
    use crate::random::normal;

    /// The relative error of the norms of `w` (out, in) against the dense sum, for both layouts, with kept squares and
    /// without.
    fn error(w: &Tensor, a: &Tensor, b: &Tensor) -> Result<f64> {
        let ((out, _), r) = (w.dims2()?, a.dim(0)?);
        let split = Split { outputs: 0..out, ranks: 0..r, b_rows: 0..out };
        let update = LowRank::new(a.clone(), b.clone(), 0.5, 0., vec![split]);
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let dense = (wide(w)? + (wide(b)?.matmul(&wide(a)?)? * 0.5)?)?;
        let dense = dense.sqr()?.sum(1)?.sqrt()?;
        let (rows, columns) = (w.t()?, w.t()?.contiguous()?);
        let mut error = 0f64;
        for w in [&rows, &columns] {
            for base_squares in [Some(squares(&w.t()?.contiguous()?, 0)?), None] {
                let magnitude = Magnitude { m: dense.clone(), base_squares, norms: None };
                let found = norms(&Matrix::Dense(w.clone()), &update, &magnitude)?;
                let apart = ((wide(&found)? / &dense)? - 1.)?.abs()?.max_all()?;
                error = error.max(apart.to_scalar()?);
            }
        }
        Ok(error)
    }

    #[test]
    fn norms_are_those_of_the_dense_sum() -> Result<()> {
        let dtypes =
            [(DType::F32, 1e-5), (DType::F64, 1e-12), (DType::F16, 5e-3), (DType::BF16, 0.03)];
        for (dtype, tolerance) in dtypes {
            for (out, k, r) in [(1, 1, 1), (4, 64, 2), (7, 131, 3), (130, 33, 8)] {
                let factor = compute_dtype(dtype);
                let rand = |dims: (usize, usize), dtype| normal(dims)?.to_dtype(dtype);
                let (w, a, b) =
                    (rand((out, k), dtype)?, rand((r, k), factor)?, rand((out, r), factor)?);
                let error = error(&w, &a, &b)?;
                assert!(error < tolerance, "{dtype:?} {out} {k} {r}: {error}");
            }
        }
        Ok(())
    }

    /// `w + 0.5·b·A` is a small rest of larger values.
    #[test]
    fn an_update_that_takes_an_output_away_keeps_the_digits_of_the_rest() -> Result<()> {
        let rand = |dims: (usize, usize)| normal(dims)?.to_dtype(DType::F32);
        let (a, b) = (rand((3, 70))?, rand((9, 3))?);
        for share in [0.5, 0.9, 0.99, 0.999, 1.] {
            let w = ((b.matmul(&a)? * (-0.5 * share))? + (rand((9, 70))? * 1e-2)?)?;
            let error = error(&w, &a, &b)?;
            assert!(error < 2e-5, "{share}: {error}");
        }
        Ok(())
    }
}
