//! The cross-entropy of rows of logits, and its gradient in the same pass.

use super::cpu::{exp_nonpositive, map_tensor_rows, max, sum};
use super::op::{compute_dtype, is_f32_on_cpu};
use candle_core::{Result, Tensor};
use std::sync::atomic::{AtomicU32, Ordering};

/// The sum over rows of logits (m, classes) of `-ln softmax(row)[label]`, a scalar, and `scale` times its
/// gradient (m, classes), both in the compute dtype and without a graph. Labels are less than `classes`.
pub(crate) fn cross_entropy(
    logits: &Tensor,
    labels: &[u32],
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let logits = logits.detach().to_dtype(compute_dtype(logits.dtype()))?.contiguous()?;
    if !is_f32_on_cpu(&logits) {
        return composed(&logits, labels, scale);
    }
    let losses: Vec<_> = labels.iter().map(|_| AtomicU32::new(0)).collect();
    let by = scale as f32;
    let grad = map_tensor_rows(
        [&logits],
        #[inline(always)]
        |row, [x], g| {
            let (label, max) = (labels[row] as usize, max(x));
            g.iter_mut().zip(x).for_each(|(g, x)| *g = exp_nonpositive(x - max));
            let total = sum(g, g, |g, _| g);
            losses[row].store((total.ln() + (max - x[label])).to_bits(), Ordering::Relaxed);
            let scale = by / total;
            g.iter_mut().for_each(|g| *g *= scale);
            g[label] -= by;
        },
    )?;
    let loss: f64 =
        losses.into_iter().map(|loss| f64::from(f32::from_bits(loss.into_inner()))).sum();
    Ok((Tensor::new(loss as f32, logits.device())?, grad))
}

fn composed(logits: &Tensor, labels: &[u32], scale: f64) -> Result<(Tensor, Tensor)> {
    let labels = Tensor::new(labels, logits.device())?.unsqueeze(1)?;
    let max = logits.max_keepdim(1)?;
    let p = logits.broadcast_sub(&max)?.exp()?;
    let total = p.sum_keepdim(1)?;
    let loss = ((total.log()? + max)? - logits.gather(&labels, 1)?)?.sum_all()?;
    let at_label = labels.ones_like()?.to_dtype(p.dtype())?.neg()?;
    let grad = (p.broadcast_div(&total)?.scatter_add(&labels, &at_label, 1)? * scale)?;
    Ok((loss, grad))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;
    use candle_core::{DType, Device, Var};

    #[test]
    fn loss_and_gradient_are_those_of_candle_s_operations() -> Result<()> {
        let labels = [3, 0, 36];
        let x = Var::from_tensor(&(normal((3, 37))? * 5.)?)?;
        let picked = Tensor::new(&labels, &Device::Cpu)?;
        let loss = candle_nn::loss::cross_entropy(x.as_tensor(), &picked)?;
        let expected = (loss.backward()?.get(&x).unwrap() * 6.)?;
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::BF16, 3e-2)] {
            let (sum, grad) = cross_entropy(&x.to_dtype(dtype)?, &labels, 2.)?;
            let sum = sum.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            let exact = 3. * loss.to_scalar::<f64>()?;
            assert!((sum - exact).abs() < 10. * tolerance * exact, "{sum}, expected {exact}");
            let apart = (grad.to_dtype(DType::F64)? - &expected)?.abs()?.max_all()?;
            assert!(apart.to_scalar::<f64>()? < 10. * tolerance);
        }
        Ok(())
    }
}
