//! GELU and SiLU as one operation each. candle's backward takes several passes and buffers.

use super::cpu::{exp_nonpositive, map_rows, map_tensor_rows};
use super::op::{compute_dtype, if_tracked, operand, run, Fused, Grads, Operand};
use candle_core::{CpuStorage, DType, Result, Shape, Tensor};
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

/// An activation with its derivative.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Activation {
    /// GELU with the tanh approximation: `x·σ(2z)`, `z = √(2/π)·(x + 0.044715·x³)`.
    Gelu,
    /// GELU with the normal distribution: `x·Φ(x)`.
    GeluErf,
    /// `x·σ(x)`
    Silu,
}

/// `x` of any shape.
pub(crate) fn activation(x: &Tensor, kind: Activation) -> Result<Tensor> {
    run(kind, [x])
}

impl Fused<1> for Activation {
    const NAME: &'static str = "activation";

    fn forward(&self, [x]: [Operand; 1]) -> Result<(CpuStorage, Shape)> {
        match self {
            Self::Gelu => map(x, gelu),
            Self::GeluErf => map(x, gelu_erf),
            Self::Silu => map(x, silu),
        }
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        let gx = || match self {
            Self::Gelu => map_grad(x, grad, gelu),
            Self::GeluErf => map_grad(x, grad, gelu_erf),
            Self::Silu => map_grad(x, grad, silu),
        };
        Ok([if_tracked(x, gx)?])
    }

    fn composed(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        // candle's kernels compute in the dtype, where the tails of GELU are a small difference.
        let wide = || x.to_dtype(compute_dtype(x.dtype()));
        match self {
            Self::Gelu => wide()?.gelu()?.to_dtype(x.dtype()),
            Self::GeluErf => wide()?.gelu_erf()?.to_dtype(x.dtype()),
            Self::Silu => x.silu(),
        }
    }

    fn composed_backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        let gx = || {
            let x = operand(x, compute_dtype(x.dtype()))?;
            grad.to_dtype(x.dtype())? * self.derivative(&x)?
        };
        Ok([if_tracked(x, gx)?])
    }
}

impl Activation {
    fn derivative(self, x: &Tensor) -> Result<Tensor> {
        /// σ(z) + x·z'·σ(z)·(1 − σ(z))
        fn of_sigmoid(x: &Tensor, z: &Tensor, slope: Option<Tensor>) -> Result<Tensor> {
            let s = candle_nn::ops::sigmoid(z)?;
            let by_x = match slope {
                Some(slope) => (x * slope)?,
                None => x.clone(),
            };
            &s * ((by_x * s.affine(-1., 1.)?)? + 1.)?
        }
        match self {
            Self::Silu => of_sigmoid(x, x, None),
            Self::Gelu => {
                let squares = x.sqr()?;
                let z = (x * squares.affine(2. * CUBIC, 2. * LINEAR)?)?;
                of_sigmoid(x, &z, Some(squares.affine(6. * CUBIC, 2. * LINEAR)?))
            }
            Self::GeluErf => {
                let cdf = (x * FRAC_1_SQRT_2)?.erf()?.affine(0.5, 0.5)?;
                let density = (x.sqr()? * -0.5)?.exp()?;
                cdf + ((x * density)? * (0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2))?
            }
        }
    }
}

/// `f` returns the value and the derivative.
#[inline(always)]
fn map(x: Operand, f: impl Fn(f32) -> (f32, f32) + Sync) -> Result<(CpuStorage, Shape)> {
    map_rows(
        [x],
        #[inline(always)]
        |_, [x], y| y.iter_mut().zip(x).for_each(|(y, x)| *y = f(*x).0),
    )
}

#[inline(always)]
fn map_grad(x: &Tensor, grad: &Tensor, f: impl Fn(f32) -> (f32, f32) + Sync) -> Result<Tensor> {
    map_tensor_rows(
        [&operand(x, DType::F32)?, grad],
        #[inline(always)]
        |_, [x, g], gx| {
            gx.iter_mut().zip(x).zip(g).for_each(|((gx, x), g)| *gx = g * f(*x).1);
        },
    )
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let e = exp_nonpositive(-x.abs());
    (if x < 0. { e } else { 1. }) / (1. + e)
}

#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s + x * s * (1. - s))
}

/// √(2/π)
const LINEAR: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715 * LINEAR;

#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    let (linear, cubic) = (LINEAR as f32, CUBIC as f32);
    let s = sigmoid(2. * x * (linear + cubic * x * x));
    (x * s, s + x * s * (1. - s) * 2. * (linear + 3. * cubic * x * x))
}

/// Φ by Abramowitz and Stegun 7.1.26, to 1e-7.
#[inline(always)]
fn gelu_erf(x: f32) -> (f32, f32) {
    let e = exp_nonpositive(-0.5 * x * x);
    let t = 1. / (1. + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let series = t
        * (0.254_829_6
            + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let tail = 0.5 * series * e;
    let cdf = if x < 0. { tail } else { 1. - tail };
    // 1/√(2π)
    let density = 0.398_942_3 * e;
    (x * cdf, cdf + x * density)
}
