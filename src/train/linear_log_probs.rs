//! The log-probabilities that a language model gives to a text, without all of its logits.

use super::labelled::{Labelled, Pass};
use crate::layers::binding::active::Activations;
use crate::layers::Linear;
use crate::ops::{compute_dtype, differ, with_backward, with_grads};
use candle_core::{bail, DType, Result, Tensor};

/// The log-probability of each label by `head(x)`, `log_softmax(head(x))[label]`, from the hidden states `x` (.., in) and
/// the labels (..), integers less than the head's outputs: what preference losses such as [`dpo_loss`](super::dpo_loss)
/// are computed from. A tensor (..) in F32 (F64 beside F64), with 0 where a label is negative, such as torch's -100.
///
/// A few rows at a time have logits, as in [`linear_cross_entropy`](super::linear_cross_entropy). Gradients reach `x` and
/// what the head trains. Beside a frozen head they are computed with the values; a head that trains computes its
/// logits again in the backward, by the adapter that was chosen in the forward.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_nn::{VarBuilder, VarMap};
/// use loralib as lora;
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let head = lora::linear_no_bias(4, 10, lora::LoraConfig::default(), vb)?;
/// let hidden = Var::ones((2, 3, 4), DType::F32, &Device::Cpu)?;
/// // Each position's label is the next token; prompt and padding have none.
/// let labels = Tensor::new(&[[-100i64, 7, 9], [-100, 2, -100]], &Device::Cpu)?;
/// let log_probs = lora::train::linear_log_probs(&hidden, &head, &labels)?;
/// let of_texts = log_probs.sum(1)?;
/// assert_eq!(of_texts.dims(), [2]);
/// assert!(of_texts.sum_all()?.backward()?.get(&hidden).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// If the labels do not fit `x`, one is not less than the number of classes, or all are negative; and if the head's weight
/// is computed from a variable, as a transposed one is. In the backward, on the CPU: if the head trains and gives other
/// outputs than in the forward, as dropout makes it.
pub fn linear_log_probs(x: &Tensor, head: &Linear, labels: &Tensor) -> Result<Tensor> {
    linear_log_probs_with(x, head, labels, |logits| Ok(logits.clone()))
}

/// [`linear_log_probs`] of logits that change before the softmax, by the model (Gemma 2's cap) or by a temperature:
/// `logits` gets those of some rows (rows, classes), and gives as many.
///
/// # Errors
/// As [`linear_log_probs`], and those of `logits`, which must not change the shape.
pub fn linear_log_probs_with(
    x: &Tensor,
    head: &Linear,
    labels: &Tensor,
    logits: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let labelled = Labelled::new("linear_log_probs", x, head, labels)?;
    let ones = labelled.trained.is_empty().then(|| vec![1.; labelled.len()]);
    let Pass { log_probs, x, .. } = labelled.pass(head, &logits, ones.as_deref())?;
    if ones.is_some() {
        let grads = x.map(|grad| (labelled.x.clone(), grad)).into_iter().collect();
        return labelled.among_all(with_grads(log_probs, grads)?, labels.dims());
    }
    // candle's operations have three operands at most: the variables are one, which candle's own operations split again
    // in the backward.
    let dtype = compute_dtype(labelled.trained[0].dtype());
    let flat = labelled.trained.iter().map(|t| t.flatten_all()?.to_dtype(dtype));
    let flat = Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?;
    let (at, active) = (labelled.clone(), Activations::current());
    let (head, values) = (head.clone(), log_probs.detach());
    let backward = move |g: &Tensor| {
        let weights = g.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let pass = active.clone().run(|| at.pass(&head, &logits, Some(&weights)))?;
        // On a device this would wait for it.
        if values.device().is_cpu() && differ(&values, &pass.log_probs)? {
            bail!(
                "linear_log_probs: the head gave other logits in the backward: it has dropout, or its mode or \
                 variables have changed"
            )
        }
        let grads = at.trained.iter().zip(pass.trained).map(|(t, grad)| match grad {
            Some(grad) => grad.flatten_all()?.to_dtype(dtype),
            None => Tensor::zeros(t.elem_count(), dtype, t.device()),
        });
        let grads = Tensor::cat(&grads.collect::<Result<Vec<_>>>()?, 0)?;
        let gx = pass.x.map(|grad| grad.to_dtype(at.x.dtype())).transpose()?;
        Ok([gx, Some(grads)])
    };
    let values = with_backward(&log_probs, [&labelled.x, &flat], backward)?;
    labelled.among_all(values, labels.dims())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Adapter;
    use crate::random::normal;
    use crate::{Adapters, LoraConfig};
    use candle_core::{Device, Module, Var};
    use candle_nn::ops::log_softmax;
    use candle_nn::{VarBuilder, VarMap};

    const CLASSES: usize = 30;

    /// A frozen head, or one that trains its bias and its factors.
    fn head(dtype: DType, trained: bool, lora_dropout: f32) -> Result<Linear> {
        let tensor = |shape: (usize, usize)| normal(shape)?.to_dtype(dtype);
        if !trained {
            let base = candle_nn::Linear::new(tensor((CLASSES, 5))?, None);
            return Linear::new(
                base,
                LoraConfig::default(),
                VarBuilder::zeros(dtype, &Device::Cpu),
            );
        }
        let vars = VarMap::new();
        for (name, shape) in [("lora_A", (2, 5)), ("lora_B", (CLASSES, 2))] {
            let var = Var::from_tensor(&tensor(shape)?)?;
            vars.data().lock().unwrap().insert(name.into(), var);
        }
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        crate::linear(5, CLASSES, LoraConfig { r: 2, lora_dropout, ..Default::default() }, vb)
    }

    fn labels() -> Result<Tensor> {
        let labels = (0..14).map(|i| if i % 3 == 1 { -100 } else { (i * 7) % CLASSES as i64 });
        Tensor::from_vec(labels.collect::<Vec<_>>(), (2, 7), &Device::Cpu)
    }

    /// The definition, with all logits.
    fn defined(x: &Tensor, head: &Linear, labels: &Tensor) -> Result<Tensor> {
        let counts = labels.ge(0i64)?.to_dtype(x.dtype())?;
        let at = labels.maximum(&labels.zeros_like()?)?.unsqueeze(2)?;
        log_softmax(&head.forward(x)?, 2)?.gather(&at, 2)?.squeeze(2)? * counts
    }

    fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
        (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar()
    }

    #[test]
    fn values_and_gradients_are_those_of_all_logits_at_once() -> Result<()> {
        for (dtype, trained, tolerance) in [
            (DType::F64, false, 1e-12),
            (DType::F64, true, 1e-12),
            (DType::F32, true, 1e-4),
            (DType::F32, false, 1e-4),
            (DType::BF16, true, 0.3),
        ] {
            let head = head(dtype, trained, 0.)?;
            let x = Var::from_tensor(&normal((2, 7, 5))?.to_dtype(dtype)?)?;
            // Each row has a gradient of its own.
            let by = normal((2, 7))?.to_dtype(compute_dtype(dtype))?;
            let found = linear_log_probs(&x, &head, &labels()?)?;
            let expected = defined(&x, &head, &labels()?)?.to_dtype(by.dtype())?;
            assert_eq!((found.dims(), found.dtype()), (&[2, 7][..], by.dtype()));
            assert!(apart(&found, &expected)? < tolerance, "{dtype:?}");
            let grads = (&found * &by)?.sum_all()?.backward()?;
            let expected = (expected * &by)?.sum_all()?.backward()?;
            let tracked = head.tracked();
            assert_eq!(tracked.len(), if trained { 3 } else { 0 });
            for t in [x.as_tensor()].into_iter().chain(&tracked) {
                let (found, expected) = (grads.get(t).unwrap(), expected.get(t).unwrap());
                assert!(apart(found, expected)? < tolerance, "{dtype:?} {found} {expected}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_temperature_divides_the_logits() -> Result<()> {
        let (head, x) = (head(DType::F64, false, 0.)?, Var::from_tensor(&normal((2, 7, 5))?)?);
        let warm = linear_log_probs_with(&x, &head, &labels()?, |logits| logits / 0.5)?;
        let doubled = defined(&(x.as_tensor() * 2.)?, &head, &labels()?)?;
        assert!(apart(&warm, &doubled)? < 1e-12);
        let (found, expected) = (warm.sum_all()?.backward()?, doubled.sum_all()?.backward()?);
        assert!(apart(found.get(&x).unwrap(), expected.get(&x).unwrap())? < 1e-12);
        Ok(())
    }

    #[test]
    fn nothing_to_train_records_no_graph() -> Result<()> {
        let (head, x) = (head(DType::F32, false, 0.)?, normal((2, 7, 5))?.to_dtype(DType::F32)?);
        let log_probs = linear_log_probs(&x, &head, &labels()?)?;
        assert!(!log_probs.track_op());
        assert!(apart(&log_probs, &defined(&x, &head, &labels()?)?)? < 1e-5);
        Ok(())
    }

    #[test]
    fn dropout_in_a_trained_head_is_an_error_of_the_backward() -> Result<()> {
        let (head, x) = (head(DType::F32, true, 0.5)?, normal((2, 7, 5))?.to_dtype(DType::F32)?);
        let error = linear_log_probs(&x, &head, &labels()?)?.sum_all()?.backward().err();
        let error = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("it has dropout"), "{error}");
        Ok(())
    }

    #[test]
    fn the_backward_computes_with_the_adapter_of_the_forward() -> crate::Result<()> {
        let device = &Device::Cpu;
        let weights = [("lm_head.weight".to_owned(), normal((CLASSES, 5))?.to_dtype(DType::F32)?)];
        let base =
            || VarBuilder::from_tensors(weights.iter().cloned().collect(), DType::F32, device);
        let cfg = LoraConfig { r: 2, ..Default::default() };
        let adapters = Adapters::new();
        let head =
            crate::nn::linear_no_bias(5, CLASSES, adapters.var_builder(base()).pp("lm_head"))?;
        let named = |name: &str| -> crate::Result<Adapter> {
            let adapter = Adapter::new(cfg).targets(["lm_head"]);
            adapters.add(name, &adapter)?;
            for var in adapter.named_vars()?.values() {
                var.set(&normal(var.shape())?.to_dtype(DType::F32)?)?;
            }
            Ok(adapter)
        };
        let (one, _two) = (named("one")?, named("two")?);
        let x = normal((2, 7, 5))?.to_dtype(DType::F32)?;
        let (labels, x) = (labels()?, &x);
        let found = adapters.with("one", || linear_log_probs(x, &head, &labels))?;
        let found = found.sum_all()?.backward()?; // outside of the choice
        let expected = adapters.with("one", || defined(x, &head, &labels))?;
        let expected = expected.sum_all()?.backward()?;
        for var in one.named_vars()?.values() {
            assert!(apart(found.get(var).unwrap(), expected.get(var).unwrap())? < 1e-4);
        }
        Ok(())
    }

    #[test]
    fn labels_that_are_all_masked_are_an_error() -> Result<()> {
        let (head, x) =
            (head(DType::F32, false, 0.)?, Tensor::zeros((2, 5), DType::F32, &Device::Cpu)?);
        let labels = Tensor::new(&[-100i64, -100], &Device::Cpu)?;
        let error = linear_log_probs(&x, &head, &labels).unwrap_err().to_string();
        assert!(error.contains("linear_log_probs: no label counts"), "{error}");
        Ok(())
    }
}
