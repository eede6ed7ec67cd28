//! A step of AdamW ([Loshchilov & Hutter 2019](https://arxiv.org/abs/1711.05101)), in place:
//! `m ← β₁m + (1-β₁)g`, `v ← β₂v + (1-β₂)g²`,
//! `θ ← (1-ηλ)θ - η·(m/(1-β₁ᵗ)) / (√(v/(1-β₂ᵗ)) + ε)`.

use super::cpu::{AdamWMoment, AdamWUpdate};
use super::op::compute_dtype;
use super::place::is_fused;
use candle_core::{Result, Tensor, Var};

/// The numbers of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamWStep {
    /// η
    pub rate: f64,
    /// λ
    pub decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// t, from 1 on
    pub t: u32,
}

impl AdamWStep {
    /// 1 / (1-β₁ᵗ) and 1 / (1-β₂ᵗ)
    fn corrections(&self) -> (f64, f64) {
        let correction = |beta: f64| 1. / (1. - beta.powf(f64::from(self.t)));
        (correction(self.beta1), correction(self.beta2))
    }
}

/// The moments of a variable, zero, in F32 (F64 beside F64): in F16 the squares of small gradients are 0.
pub(crate) fn new_moments(var: &Var) -> Result<(Var, Var)> {
    let zeros = || Var::zeros(var.shape(), compute_dtype(var.dtype()), var.device());
    Ok((zeros()?, zeros()?))
}

pub(crate) fn adamw(var: &Var, (m, v): (&Var, &Var), g: &Tensor, step: AdamWStep) -> Result<()> {
    let g = g.to_dtype(m.dtype())?.contiguous()?;
    if is_fused(var.device()) && var.is_contiguous() {
        m.inplace_op2(&g, &AdamWMoment { beta: step.beta1, squared: false })?;
        v.inplace_op2(&g, &AdamWMoment { beta: step.beta2, squared: true })?;
        let (by_m, by_v) = step.corrections();
        let (keep, rate) = (1. - step.rate * step.decay, step.rate * by_m);
        return var.inplace_op3(m, v, &AdamWUpdate { keep, rate, by_v, eps: step.eps });
    }
    let average =
        |m: &Var, g: &Tensor, beta: f64| m.set(&((m.as_tensor() * beta)? + (g * (1. - beta))?)?);
    average(m, &g, step.beta1)?;
    average(v, &g.sqr()?, step.beta2)?;
    let (by_m, by_v) = step.corrections();
    let change = ((m.as_tensor() * by_m)? / ((v.as_tensor() * by_v)?.sqrt()? + step.eps)?)?;
    let theta = (var.to_dtype(m.dtype())? * (1. - step.rate * step.decay))?;
    var.set(&(theta - (change * step.rate)?)?.to_dtype(var.dtype())?)
}
