//! Compares gradients with finite differences of the loss.

use super::trainable::{expected, variables};
use crate::layers::Part;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;

/// How far a gradient may be from the finite difference, relative to its norm, beside the estimated error of
/// the latter.
const TOLERANCE: f64 = 0.02;

/// The share of the largest gradient's norm below which a gradient that is too small for the loss is not compared.
const NEGLIGIBLE: f64 = 1e-2;

/// Compares each adapter variable's gradient with a finite difference of the loss in two directions: along
/// the gradient, and along a fixed pseudo-random direction.
///
/// It detects what [`missing_grads`](crate::missing_grads) does not: an operation without a backward that
/// cuts one of several paths leaves gradients that are there and wrong. It finds errors of a few percent in
/// variables of a few hundred values; in larger ones an error that is orthogonal to the gradient may pass, so
/// use a tiny model in F32 or F64 (in half precision the loss is too coarse). `loss` computes the same loss again,
/// without dropout; it is called eight times for each variable. The
/// variables have their values again afterwards, also on an error.
///
/// With [`use_dora`](crate::LoraConfig::use_dora) a layer's magnitude is compared alone: the gradients of its factors
/// leave out that the norm depends on them.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use loralib as lora;
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let cfg = lora::LoraConfig { r: 2, ..Default::default() };
/// let layer = lora::linear(6, 5, cfg, vb)?;
/// let x = Tensor::randn(0f32, 1., (4, 6), &Device::Cpu)?;
/// let loss = || layer.forward(&x)?.sqr()?.mean_all();
/// let grads = loss()?.backward()?;
/// lora::utils::check_grads(&vars, &grads, loss)?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// If a gradient is missing or disagrees, with the names and the values of both; if one is too small beside the loss to be
/// compared; if `loss` fails, is not finite, or is not the same twice, as with dropout.
pub fn check_grads(
    vars: &VarMap,
    grads: &GradStore,
    loss: impl Fn() -> candle_core::Result<Tensor>,
) -> Result<()> {
    let vars = variables(vars);
    let value = || -> Result<f64> {
        let loss = loss()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if loss.is_finite() {
            Ok(loss)
        } else {
            Err(Error::Invalid(format!("the loss is {loss}")))
        }
    };
    let (once, again) = (value()?, value()?);
    if once != again {
        let reason = format!("the loss is {once} and then {again}: is dropout on?");
        return Err(Error::Invalid(reason));
    }
    let mut wrong = vec![];
    let compared = |name: &&str| match Part::parse(name) {
        (path, Part::A | Part::B) => !vars.contains_key(&Part::Magnitude.at(path)),
        (_, part) => !part.is_initial(),
    };
    let names = expected(&vars, true).filter(compared);
    let norms = vars.values().filter_map(|var| grads.get(var)).map(norm);
    let largest = norms.collect::<Result<Vec<_>>>()?.into_iter().fold(0., f64::max);
    for (name, var) in names.filter_map(|name| Some((name, vars.get(name)?))) {
        let before = var.as_tensor().copy()?.detach();
        let difference = |direction: &Tensor, step: f64| -> Result<f64> {
            let at = |sign: f64| -> Result<f64> {
                var.set(&(&before + (direction * (sign * step))?)?)?;
                value()
            };
            let difference = at(1.).and_then(|up| Ok((up - at(-1.)?) / (2. * step)));
            var.set(&before)?;
            difference
        };
        if let Some(reason) = disagreement(var, grads.get(var), once, largest, difference)? {
            wrong.push(format!("{name} ({reason})"));
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(Error::Invalid(format!("gradients disagree with the loss: {}", wrong.join(", "))))
    }
}

/// Why the gradient of a variable is wrong, if it is. `difference` is the slope of the loss along a
/// direction, by a central difference of a step, and `largest` the norm of the largest gradient.
fn disagreement(
    var: &Var,
    grad: Option<&Tensor>,
    loss: f64,
    largest: f64,
    difference: impl Fn(&Tensor, f64) -> Result<f64>,
) -> Result<Option<String>> {
    let length = grad.map_or(Ok(0.), norm)?;
    if !(length.is_finite() && norm(var.as_tensor())?.is_finite()) {
        return Ok(Some("it or its gradient has values that are not finite".to_owned()));
    }
    let random = pseudo_random(var.as_tensor())?;
    let random = (&random / norm(&random)?)?;
    let mut directions = vec![(random.clone(), "a random direction")];
    if let (Some(grad), true) = (grad, length > 0.) {
        directions.push(((grad.to_dtype(var.dtype())? / length)?, "its own direction"));
    }
    // A change of the loss by about 1 %, within a tenth of the variable's own norm and one unit.
    let most = 0.1 * norm(var.as_tensor())? + 0.01;
    let step = (0.01 * loss.abs() / length.max(1e-12)).clamp(1e-4, most);
    for (direction, name) in directions {
        let expected: f64 = match grad {
            Some(grad) => (grad.to_dtype(DType::F64)? * direction.to_dtype(DType::F64)?)?
                .sum_all()?
                .to_scalar()?,
            None => 0.,
        };
        let (coarse, fine) = (difference(&direction, step)?, difference(&direction, step / 2.)?);
        // Richardson's extrapolation and its error, and the rounding of an F32 loss.
        let slope = fine + (fine - coarse) / 3.;
        let error = (fine - coarse).abs() + 1e-6 * loss.abs() / step;
        // One that hardly counts beside others is left out.
        let counts = length > NEGLIGIBLE * largest;
        if counts && expected.abs() > 0.5 * length && error > 0.5 * length {
            return Ok(Some(format!(
                "its norm {length:.4e} is too small to be compared: a finite difference of a loss near {loss:.4e} has \
                 errors of {error:.1e}; take a loss of fewer terms, or F64"
            )));
        }
        if (slope - expected).abs() > TOLERANCE * length + error {
            let is = if grad.is_some() { "the gradient gives" } else { "no gradient, as if" };
            return Ok(Some(format!("{is} {expected:.4e}, the loss {slope:.4e} along {name}")));
        }
    }
    Ok(None)
}

fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.to_dtype(DType::F64)?.sqr()?.sum_all()?.sqrt()?.to_scalar::<f64>()?)
}

/// ±1 by a linear congruential generator: the same in each run, as a finite difference should be.
fn pseudo_random(like: &Tensor) -> candle_core::Result<Tensor> {
    let mut state = 0x2545_f491u32;
    let mut sign = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if state >> 31 == 0 {
            1f32
        } else {
            -1.
        }
    };
    let signs: Vec<_> = (0..like.elem_count()).map(|_| sign()).collect();
    Tensor::from_vec(signs, like.shape(), like.device())?.to_dtype(like.dtype())
}
