//! The log-probabilities of labels by rows of logits, and their gradient in the same pass.

use super::cpu::{exp_nonpositive, map_tensor_rows, max, sum};
use super::op::{compute_dtype, is_f32_on_cpu};
use candle_core::{Device, Result, Tensor};
use std::sync::atomic::{AtomicU32, Ordering};

/// `ln softmax(row)[label]` of each row of logits (m, classes), and the gradient (m, classes) of their sum by `weights`,
/// one for each row. Both are in the compute dtype and without a graph. Labels are less than `classes`.
pub(crate) fn log_probs(
    logits: &Tensor,
    labels: &[u32],
    weights: &[f64],
) -> Result<(Tensor, Tensor)> {
    let logits = logits.detach().to_dtype(compute_dtype(logits.dtype()))?.contiguous()?;
    if !is_f32_on_cpu(&logits) {
        return composed(&logits, labels, weights);
    }
    let log_probs: Vec<_> = labels.iter().map(|_| AtomicU32::new(0)).collect();
    let grad = map_tensor_rows(
        [&logits],
        #[inline(always)]
        |row, [x], g| {
            let (label, max, by) = (labels[row] as usize, max(x), weights[row] as f32);
            g.iter_mut().zip(x).for_each(|(g, x)| *g = exp_nonpositive(x - max));
            let total = sum(g, g, |g, _| g);
            log_probs[row].store((x[label] - max - total.ln()).to_bits(), Ordering::Relaxed);
            let scale = -by / total;
            g.iter_mut().for_each(|g| *g *= scale);
            g[label] += by;
        },
    )?;
    let log_probs: Vec<_> =
        log_probs.into_iter().map(|value| f32::from_bits(value.into_inner())).collect();
    Ok((Tensor::from_vec(log_probs, labels.len(), logits.device())?, grad))
}

fn composed(logits: &Tensor, labels: &[u32], weights: &[f64]) -> Result<(Tensor, Tensor)> {
    let labels = Tensor::new(labels, logits.device())?.unsqueeze(1)?;
    let by = Tensor::new(weights, &Device::Cpu)?.to_dtype(logits.dtype())?;
    let by = by.to_device(logits.device())?.unsqueeze(1)?;
    let max = logits.max_keepdim(1)?;
    let p = logits.broadcast_sub(&max)?.exp()?;
    let total = p.sum_keepdim(1)?;
    let log_probs = ((logits.gather(&labels, 1)? - max)? - total.log()?)?.squeeze(1)?;
    let grad = p.broadcast_mul(&(&by / total)?.neg()?)?.scatter_add(&labels, &by, 1)?;
    Ok((log_probs, grad))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;
    use candle_core::{DType, Var};

    #[test]
    fn values_and_gradient_are_those_of_candle_s_operations() -> Result<()> {
        let (labels, weights) = ([3, 0, 36], [2., -1., 0.5]);
        let x = Var::from_tensor(&(normal((3, 37))? * 5.)?)?;
        let picked = Tensor::new(&labels, &Device::Cpu)?.unsqueeze(1)?;
        let all = candle_nn::ops::log_softmax(&x, 1)?.gather(&picked, 1)?.squeeze(1)?;
        let sum = (&all * Tensor::new(&weights, &Device::Cpu)?)?.sum_all()?;
        let expected = sum.backward()?.get(&x).unwrap().clone();
        let apart = |a: &Tensor, b: &Tensor| {
            (a.to_dtype(DType::F64)? - b)?.abs()?.max_all()?.to_scalar::<f64>()
        };
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::BF16, 0.1)] {
            let (values, grad) = log_probs(&x.to_dtype(dtype)?, &labels, &weights)?;
            assert!(apart(&values, &all)? < tolerance);
            assert!(apart(&grad, &expected)? < tolerance);
        }
        Ok(())
    }
}
