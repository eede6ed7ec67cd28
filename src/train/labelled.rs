//! Rows of hidden states with a label each, of which a few at a time have logits.

use crate::layers::Linear;
use crate::ops::{compute_dtype, log_probs, upstream};
use candle_core::{bail, DType, Device, Module, Result, Tensor, Var};

/// Logits that are in memory at a time.
const LOGITS: usize = if cfg!(test) { 100 } else { 1 << 23 };

/// The rows whose labels count.
#[derive(Clone)]
pub(super) struct Labelled {
    /// (rows, in), with their graph.
    pub x: Tensor,
    /// The variables that the head computes with.
    pub trained: Vec<Tensor>,
    labels: Vec<u32>,
    /// Which of all rows they are, if some are left out.
    positions: Option<Tensor>,
    /// Of the function, for messages.
    name: &'static str,
}

/// What the logits say.
pub(super) struct Pass {
    /// (rows)
    pub log_probs: Tensor,
    /// Gradients of a sum of the log-probabilities by weights: of the hidden states and of each of the head's variables, as
    /// far as they are tracked.
    pub x: Option<Tensor>,
    pub trained: Vec<Option<Tensor>>,
}

impl Labelled {
    /// Of the hidden states (.., in) and their labels (..).
    pub fn new(name: &'static str, x: &Tensor, head: &Linear, labels: &Tensor) -> Result<Self> {
        let classes = head.out_features()?;
        let Some((&last, leading)) = x.dims().split_last() else {
            bail!("{name}: x is a scalar, expected (.., in)")
        };
        if labels.dims() != leading {
            bail!("{name}: x is {:?} and the labels {:?}", x.dims(), labels.dims())
        }
        let trained = head.tracked();
        if trained.iter().any(|t| !t.is_variable()) {
            bail!(
                "{name}: the head's weight, bias or factors are computed from variables, expected the variables \
                 themselves"
            )
        }
        let (positions, labels) = counted(name, labels, classes)?;
        let x = x.reshape((leading.iter().product::<usize>(), last))?;
        if labels.len() == x.dims()[0] {
            return Ok(Self { x, trained, labels, positions: None, name });
        }
        let positions = Tensor::from_vec(positions, labels.len(), x.device())?;
        let x = x.index_select(&positions, 0)?;
        Ok(Self { x, trained, labels, positions: Some(positions), name })
    }

    /// How many labels count.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// A value of each row that counts, among zeros for the others.
    pub fn among_all(&self, values: Tensor, shape: &[usize]) -> Result<Tensor> {
        let Some(positions) = &self.positions else { return values.reshape(shape) };
        let count = shape.iter().product::<usize>();
        let zeros = Tensor::zeros(count, values.dtype(), values.device())?;
        zeros.index_add(positions, &values, 0)?.reshape(shape)
    }

    /// The log-probabilities of the labels, and with `weights`, one for each row, the gradients of their sum; all without a
    /// graph. `logits` may change the head's outputs.
    pub fn pass(
        &self,
        head: &Linear,
        logits: &impl Fn(&Tensor) -> Result<Tensor>,
        weights: Option<&[f64]>,
    ) -> Result<Pass> {
        let tracked = weights.is_some() && self.x.track_op();
        let x = self.x.detach();
        let wants_grad = tracked || weights.is_some() && !self.trained.is_empty();
        let dtype = compute_dtype(x.dtype());
        let (mut values, mut gx) = (vec![], vec![]);
        let mut trained = vec![None; self.trained.len()];
        // Chunks of about the same size.
        let parts = self.len().div_ceil((LOGITS / head.out_features()?).max(1));
        let step = self.len().div_ceil(parts.max(1)).max(1);
        for (i, labels) in self.labels.chunks(step).enumerate() {
            let part = x.narrow(0, i * step, labels.len())?;
            let part = if tracked { Var::from_tensor(&part)?.into_inner() } else { part };
            let plain = head.forward(&part)?;
            let changed = logits(&plain)?;
            if changed.dims() != plain.dims() {
                let (was, is) = (plain.dims(), changed.dims());
                bail!("{}: the logits were {was:?}, and are {is:?}", self.name)
            }
            drop(plain);
            let weights = match weights {
                Some(weights) => &weights[i * step..][..labels.len()],
                None => &vec![0.; labels.len()],
            };
            let shift = shift(changed.dtype(), weights);
            let shifted: Vec<_> = weights.iter().map(|weight| weight * shift).collect();
            let (log_probs, grad) = log_probs(&changed, labels, &shifted)?;
            values.push(log_probs);
            if !wants_grad {
                continue;
            }
            let mut grads = upstream(&changed, grad)?.backward()?;
            let unshifted = |grad: Tensor| match shift {
                1. => grad.to_dtype(dtype),
                shift => grad.to_dtype(dtype)? / shift,
            };
            if let Some(grad) = grads.remove(&part).filter(|_| tracked) {
                gx.push(unshifted(grad)?);
            }
            for (t, sum) in self.trained.iter().zip(&mut trained) {
                let Some(grad) = grads.remove(t) else { continue };
                let grad = unshifted(grad)?;
                *sum = Some(sum.take().map_or(Ok(grad.clone()), |sum: Tensor| sum + grad)?);
            }
        }
        let x = (!gx.is_empty()).then(|| Tensor::cat(&gx, 0)).transpose()?;
        Ok(Pass { log_probs: Tensor::cat(&values, 0)?, x, trained })
    }
}

/// A power of two that gradients are multiplied by on their way through a half-precision head: the p/count of a mean is
/// 0 in F16 long before a loss scale, which comes with the upstream gradient, could raise it. It leaves p as it is, but
/// for chunks of many rows, over which the gradient of the weight is a sum.
fn shift(dtype: DType, weights: &[f64]) -> f64 {
    let largest = weights.iter().fold(0f64, |largest, weight| largest.max(weight.abs()));
    match dtype {
        DType::F16 | DType::BF16 if largest > 0. && largest.is_finite() => {
            ((16. / weights.len() as f64).min(1.) / largest).log2().floor().exp2()
        }
        _ => 1.,
    }
}

/// The positions that count, and their labels.
fn counted(name: &str, labels: &Tensor, classes: usize) -> Result<(Vec<u32>, Vec<u32>)> {
    if !labels.dtype().is_int() {
        bail!("{name}: the labels are {:?}, expected integers", labels.dtype())
    }
    let labels = labels.flatten_all()?.to_device(&Device::Cpu)?;
    let labels = labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let (mut rows, mut counted) = (vec![], vec![]);
    for (row, label) in labels.into_iter().enumerate().filter(|(_, label)| *label >= 0) {
        match u32::try_from(label) {
            Ok(label) if (label as usize) < classes => counted.push(label),
            _ => bail!("{name}: label {label} at position {row} of {classes} classes"),
        }
        rows.push(row as u32);
    }
    if counted.is_empty() {
        bail!("{name}: no label counts: all are negative")
    }
    Ok((rows, counted))
}
