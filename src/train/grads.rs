//! Gradients before the step: clipped, or summed over batches.

use candle_core::backprop::GradStore;
use candle_core::{bail, DType, Result, Tensor, Var};

/// Scales the gradients of `vars` so that their norm, of all values together, is at most `max_norm`, and
/// returns the norm before, as `torch.nn.utils.clip_grad_norm_` does. One number is copied from a device.
///
/// ```
/// use candle_core::{Device, Var};
/// let x = Var::new(&[3f32, 4.], &Device::Cpu)?;
/// let mut grads = (x.sqr()?.sum_all()? * 0.5)?.backward()?;
/// let norm = loralib::train::clip_grad_norm(&[x.clone()], &mut grads, 1.)?;
/// assert_eq!(norm, 5.);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// If the norm is not finite: a step would make the variables NaN; and if `max_norm` is negative or NaN.
pub fn clip_grad_norm(vars: &[Var], grads: &mut GradStore, max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm < 0. {
        bail!("clip_grad_norm: max_norm is {max_norm}, expected a number of at least 0")
    }
    let (mut double, mut single) = (vec![], vec![]);
    for grad in vars.iter().filter_map(|var| grads.get(var)) {
        match grad.dtype() {
            DType::F64 => double.push(grad.sqr()?.sum_all()?),
            // In F16 a square of 256 is infinite.
            _ => single.push(sum(&grad.to_dtype(DType::F32)?.sqr()?)?),
        }
    }
    if double.is_empty() && single.is_empty() {
        return Ok(0.);
    }
    let mut squares = vec![];
    if !double.is_empty() {
        squares.extend(Tensor::stack(&double, 0)?.to_vec1::<f64>()?);
    }
    if !single.is_empty() {
        let single = Tensor::stack(&single, 0)?.to_vec1::<f32>()?;
        squares.extend(single.into_iter().map(f64::from));
    }
    let norm = squares.into_iter().sum::<f64>().sqrt();
    if !norm.is_finite() {
        bail!("clip_grad_norm: the norm of the gradients is {norm}")
    }
    // torch's epsilon.
    let factor = max_norm / (norm + 1e-6);
    if factor < 1. {
        for var in vars {
            if let Some(scaled) = grads.get(var).map(|grad| grad * factor).transpose()? {
                grads.insert(var, scaled);
            }
        }
    }
    Ok(norm)
}

/// The sum of all values, a scalar, in parts: after 2²⁴ ones F32 counts no further.
fn sum(t: &Tensor) -> Result<Tensor> {
    const PART: usize = 1 << 12;
    let t = t.flatten_all()?;
    let (parts, rest) = (t.elem_count() / PART, t.elem_count() % PART);
    if parts <= 1 {
        return t.sum_all();
    }
    let whole = sum(&t.narrow(0, 0, parts * PART)?.reshape((parts, PART))?.sum(1)?)?;
    whole + t.narrow(0, parts * PART, rest)?.sum_all()?
}

/// Adds the gradients of `vars` in `grads` to those in `sum`. With each batch's mean loss multiplied by its
/// share of the tokens, the sum over several batches is the gradient of one large batch.
///
/// # Errors
/// If two gradients of a variable do not fit.
pub fn add_grads(vars: &[Var], sum: &mut GradStore, mut grads: GradStore) -> Result<()> {
    for var in vars {
        let Some(grad) = grads.remove(var) else { continue };
        let both = match sum.get(var) {
            Some(sum) => (sum + grad)?,
            None => grad,
        };
        sum.insert(var, both);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn all_gradients_are_scaled_to_one_norm() -> Result<()> {
        let (a, b) = (Var::new(&[3f32, 0.], &Device::Cpu)?, Var::new(&[-4f32], &Device::Cpu)?);
        let vars = [a.clone(), b.clone()];
        let grads = || ((a.sqr()?.sum_all()? + b.sqr()?.sum_all()?)? * 0.5)?.backward();
        let mut clipped = grads()?;
        assert_eq!(clip_grad_norm(&vars, &mut clipped, 1.)?, 5.);
        let values = |grads: &GradStore, var: &Var| grads.get(var).unwrap().to_vec1::<f32>();
        assert!((values(&clipped, &a)?[0] - 0.6).abs() < 1e-6);
        assert!((values(&clipped, &b)?[0] + 0.8).abs() < 1e-6);
        let mut kept = grads()?;
        assert_eq!(clip_grad_norm(&vars, &mut kept, 6.)?, 5.);
        assert_eq!(values(&kept, &b)?, [-4.]);
        Ok(())
    }

    /// The norm of a gradient of equal values.
    fn norm(value: f64, count: usize, dtype: DType) -> Result<f64> {
        let x = Var::zeros(count, dtype, &Device::Cpu)?;
        let grad = Tensor::full(value, count, &Device::Cpu)?.to_dtype(dtype)?;
        let mut grads = (x.as_tensor() * grad)?.sum_all()?.backward()?;
        clip_grad_norm(&[x], &mut grads, f64::INFINITY)
    }

    #[test]
    fn norms_are_exact_in_every_dtype_and_size() -> Result<()> {
        // In F16 the squares are infinite, and in F32 the others.
        assert_eq!(norm(1024., 4, DType::F16)?, 2048.);
        assert_eq!(norm(1024., 4, DType::BF16)?, 2048.);
        assert_eq!(norm(1e30, 4, DType::F64)?, 2e30);
        // Beside a square of 2²⁴ each one is nothing in F32, and all of them are 6 %.
        let ones = 1 << 20;
        let values = std::iter::once(4096f32).chain(std::iter::repeat_n(1., ones));
        let values = Tensor::from_iter(values, &Device::Cpu)?;
        let x = Var::zeros(values.shape(), DType::F32, &Device::Cpu)?;
        let mut grads = (x.as_tensor() * values)?.sum_all()?.backward()?;
        let many = clip_grad_norm(&[x], &mut grads, f64::INFINITY)?;
        let exact = f64::from((1 << 24) + (1 << 20)).sqrt();
        assert!((many / exact - 1.).abs() < 1e-4, "{many}, expected {exact}");
        Ok(())
    }

    #[test]
    fn a_norm_of_nan_or_less_than_nothing_is_refused() -> Result<()> {
        let a = Var::new(&[1f32], &Device::Cpu)?;
        for max_norm in [f64::NAN, -1.] {
            let mut grads = a.sqr()?.sum_all()?.backward()?;
            let error = clip_grad_norm(std::slice::from_ref(&a), &mut grads, max_norm).unwrap_err();
            assert!(error.to_string().contains(&format!("max_norm is {max_norm}")), "{error}");
        }
        Ok(())
    }

    #[test]
    fn a_norm_that_is_not_finite_is_an_error() -> Result<()> {
        let a = Var::new(&[f32::NAN], &Device::Cpu)?;
        let mut grads = a.sqr()?.sum_all()?.backward()?;
        assert!(clip_grad_norm(&[a], &mut grads, 1.).unwrap_err().to_string().contains("NaN"));
        Ok(())
    }

    #[test]
    fn shares_of_batches_add_up_to_the_large_batch() -> Result<()> {
        let w = Var::new(&[0.5f32, -2.], &Device::Cpu)?;
        let x = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
        let loss = |x: &Tensor| x.broadcast_mul(&w)?.sqr()?.mean_all();
        let vars = [w.clone()];
        let large = loss(&x)?.backward()?;
        let part = |from, len| (loss(&x.narrow(0, from, len)?)? * (len as f64 / 3.))?.backward();
        let mut sum = part(0, 2)?;
        add_grads(&vars, &mut sum, part(2, 1)?)?;
        let values = |grads: &GradStore| grads.get(&w).unwrap().to_vec1::<f32>();
        for (a, b) in values(&sum)?.iter().zip(values(&large)?) {
            assert!((a - b).abs() < 1e-5);
        }
        Ok(())
    }
}
