//! `gelu(x) = x·Φ(x)`, with Φ the normal distribution: BERT's, to 2e-7.

use crate::nn::computed::computed;
use crate::nn::exp::exp_negative;
use crate::nn::rows::by_rows;
use candle_core::{Result, Tensor};

/// gelu of each value.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    let x_ = x.detach();
    let y = match by_rows(
        [&x_],
        #[inline(always)]
        |[x], y| {
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * normal(x).0);
        },
    )? {
        Some(y) => y,
        None => x_.gelu_erf()?.into(),
    };
    computed(x, y, move |grad| {
        let fused = by_rows(
            [&x_, grad],
            #[inline(always)]
            |[x, grad], y| {
                y.iter_mut().zip(x).zip(grad).for_each(|((y, &x), g)| {
                    let (cdf, density) = normal(x);
                    *y = g * (cdf + x * density);
                });
            },
        )?;
        match fused {
            Some(gx) => gx.tensor(),
            None => {
                let cdf = (&x_ * std::f64::consts::FRAC_1_SQRT_2)?.erf()?.affine(0.5, 0.5)?;
                let density = ((x_.sqr()? * -0.5)?.exp()? * f64::from(DENSITY_AT_0))?;
                grad * (cdf + (&x_ * density)?)?
            }
        }
    })
}

/// 1/√(2π)
const DENSITY_AT_0: f32 = 0.398_942_3;

/// The normal distribution's Φ(x), to 1e-7 (Abramowitz and Stegun 7.1.26), and density.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let e = exp_negative(-0.5 * x * x);
    let t = 1. / (1. + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let series = t
        * (0.254_829_6
            + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let tail = 0.5 * series * e;
    (if x < 0. { tail } else { 1. - tail }, DENSITY_AT_0 * e)
}
