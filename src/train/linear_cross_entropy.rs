//! The loss of a language model's head without all of its logits.

use super::labelled::Labelled;
use crate::layers::Linear;
use crate::ops::with_grads;
use candle_core::{DType, Result, Tensor};

/// The mean cross-entropy of `head(x)`, as `torch.nn.functional.cross_entropy` computes it, from the hidden
/// states `x` (.., in) and the labels (..), integers less than the head's outputs. A negative label, such as
/// torch's -100, leaves its position out. A scalar, in F32 (F64 beside F64).
///
/// The logits of a few rows at a time are computed and turned into gradients at once, so that the memory
/// for them does not depend on the number of tokens: chunks have up to 8 million logits, 32 MiB in F32, and
/// are in memory a few times. Gradients reach `x` and what the head trains: its weight, its bias, its factors, each
/// frozen or a variable. They are computed with the loss, unless there is nothing to train.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_nn::{VarBuilder, VarMap};
/// use loralib as lora;
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let head = lora::linear_no_bias(4, 10, lora::LoraConfig::default(), vb)?;
/// let hidden = Var::ones((1, 3, 4), DType::F32, &Device::Cpu)?;
/// let labels = Tensor::new(&[[7i64, 9, -100]], &Device::Cpu)?; // the last position does not count
/// let loss = lora::train::linear_cross_entropy(&hidden, &head, &labels)?;
/// assert!(loss.backward()?.get(&hidden).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// If the labels do not fit `x`, one is not less than the number of classes, or none counts; and if the weight is
/// computed from a variable, as a transposed one is.
pub fn linear_cross_entropy(x: &Tensor, head: &Linear, labels: &Tensor) -> Result<Tensor> {
    linear_cross_entropy_with(x, head, labels, |logits| Ok(logits.clone()))
}

/// [`linear_cross_entropy`] of logits that the model changes before the loss, such as Gemma 2's, which have a cap, or
/// Granite's, which are divided by a constant: `logits` gets those of some rows (rows, classes), and gives as many.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{VarBuilder, VarMap};
/// # use loralib as lora;
/// # let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// # let head = lora::linear_no_bias(4, 10, lora::LoraConfig::default(), vb)?;
/// # let hidden = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
/// # let labels = Tensor::new(&[7i64, 9, -100], &Device::Cpu)?;
/// let cap = 30.;
/// let capped = |logits: &Tensor| (logits / cap)?.tanh()? * cap;
/// let loss = lora::train::linear_cross_entropy_with(&hidden, &head, &labels, capped)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`linear_cross_entropy`], and those of `logits`, which must not change the shape.
pub fn linear_cross_entropy_with(
    x: &Tensor,
    head: &Linear,
    labels: &Tensor,
    logits: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let labelled = Labelled::new("linear_cross_entropy", x, head, labels)?;
    let count = labelled.len() as f64;
    let pass = labelled.pass(head, &logits, Some(&vec![-1. / count; labelled.len()]))?;
    let grads = [labelled.x].into_iter().chain(labelled.trained);
    let grads = grads.zip([pass.x].into_iter().chain(pass.trained));
    let grads = grads.filter_map(|(t, grad)| Some((t, grad?))).collect();
    with_grads((sum(&pass.log_probs)? / -count)?, grads)
}

/// On the CPU in F64, whatever the number of rows.
fn sum(values: &Tensor) -> Result<Tensor> {
    match values.device().is_cpu() {
        true => values.to_dtype(DType::F64)?.sum_all()?.to_dtype(values.dtype()),
        false => values.sum_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;
    use crate::LoraConfig;
    use candle_core::{Device, Module, Var};
    use candle_nn::{VarBuilder, VarMap};
    use std::collections::HashMap;

    const CLASSES: usize = 30;

    /// A head that trains its weight, its bias and its factors.
    fn head(dtype: DType) -> Result<Linear> {
        let (vars, device) = (VarMap::new(), &Device::Cpu);
        for (name, shape) in [("lora_A", (2, 5)), ("lora_B", (CLASSES, 2))] {
            let var = normal(shape)?.to_dtype(dtype)?;
            vars.data().lock().unwrap().insert(name.into(), Var::from_tensor(&var)?);
        }
        let vb = VarBuilder::from_varmap(&vars, dtype, device);
        crate::linear(5, CLASSES, LoraConfig { r: 2, ..Default::default() }, vb)
    }

    fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
        (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar()
    }

    #[test]
    fn loss_and_gradients_are_those_of_all_logits_at_once() -> Result<()> {
        let all: Vec<i64> = (0..14).map(|i| (i * 7) % CLASSES as i64).collect();
        let some = all.iter().map(|label| if label % 3 == 0 { -100 } else { *label }).collect();
        for labels in [all, some] {
            let head = head(DType::F64)?;
            let x = Var::from_tensor(&normal((2, 7, 5))?)?;
            let count: Vec<u32> = (0..14).filter(|i| labels[*i as usize] >= 0).collect();
            let rows = Tensor::new(count.as_slice(), &Device::Cpu)?;
            let labels = Tensor::from_vec(labels, (2, 7), &Device::Cpu)?;
            let logits = head.forward(&x)?.reshape((14, CLASSES))?.index_select(&rows, 0)?;
            let expected = candle_nn::loss::cross_entropy(
                &logits,
                &labels.flatten_all()?.index_select(&rows, 0)?,
            )?;
            let loss = linear_cross_entropy(&x, &head, &labels)?;
            assert!(apart(&loss, &expected)? < 1e-12);
            // The upstream gradient is 3.
            let (grads, expected) = ((loss * 3.)?.backward()?, (expected * 3.)?.backward()?);
            let tracked = [x.as_tensor(), head.lora_a().unwrap(), head.lora_b().unwrap()];
            for t in tracked {
                assert!(apart(grads.get(t).unwrap(), expected.get(t).unwrap())? < 1e-12);
            }
        }
        Ok(())
    }

    #[test]
    fn capped_logits_have_the_gradients_of_all_at_once() -> Result<()> {
        let head = head(DType::F64)?;
        let x = Var::from_tensor(&normal((14, 5))?)?;
        let labels = Tensor::arange(0i64, 14, &Device::Cpu)?;
        let capped = |logits: &Tensor| (logits / 0.5)?.tanh()? * 0.5;
        let expected = candle_nn::loss::cross_entropy(&capped(&head.forward(&x)?)?, &labels)?;
        let loss = linear_cross_entropy_with(&x, &head, &labels, capped)?;
        assert!(apart(&loss, &expected)? < 1e-12);
        let (grads, expected) = (loss.backward()?, expected.backward()?);
        for t in [x.as_tensor(), head.lora_a().unwrap(), head.lora_b().unwrap()] {
            assert!(apart(grads.get(t).unwrap(), expected.get(t).unwrap())? < 1e-12);
        }
        let half = |logits: &Tensor| logits.narrow(1, 0, CLASSES / 2);
        let error = linear_cross_entropy_with(&x, &head, &labels, half).unwrap_err().to_string();
        assert!(error.contains("and are ["), "{error}");
        Ok(())
    }

    #[test]
    fn a_trained_weight_and_bias_have_their_gradients() -> Result<()> {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
        let head = crate::linear(5, CLASSES, LoraConfig::default(), vb)?;
        let x = normal((14, 5))?;
        let labels = Tensor::arange(0i64, 14, &Device::Cpu)?;
        let expected = candle_nn::loss::cross_entropy(&head.forward(&x)?, &labels)?.backward()?;
        let grads = linear_cross_entropy(&x, &head, &labels)?.backward()?;
        for t in [head.weight(), head.bias().unwrap()] {
            assert!(apart(grads.get(t).unwrap(), expected.get(t).unwrap())? < 1e-12);
        }
        Ok(())
    }

    #[test]
    fn half_precision_states_give_an_f32_loss_and_gradients_of_their_dtype() -> Result<()> {
        let head = head(DType::BF16)?;
        let x = normal((14, 5))?.to_dtype(DType::BF16)?;
        let x = Var::from_tensor(&x)?;
        let labels = Tensor::arange(0u32, 14, &Device::Cpu)?;
        let loss = linear_cross_entropy(&x, &head, &labels)?;
        let logits = head.forward(&x)?.to_dtype(DType::F32)?;
        let expected = candle_nn::loss::cross_entropy(&logits, &labels)?;
        assert!(loss.dtype() == DType::F32 && apart(&loss, &expected)? < 1e-5);
        let (grads, expected) = (loss.backward()?, expected.backward()?);
        let (grad, expected) = (grads.get(&x).unwrap(), expected.get(&x).unwrap());
        assert!(grad.dtype() == DType::BF16 && apart(grad, expected)? < 2e-3);
        Ok(())
    }

    #[test]
    fn a_scaled_loss_scales_half_precision_gradients_without_overflow() -> Result<()> {
        let head = head(DType::F16)?;
        let x = normal((14, 5))?.to_dtype(DType::F16)?;
        let x = Var::from_tensor(&x)?;
        let labels = Tensor::arange(0i64, 14, &Device::Cpu)?;
        let loss = || linear_cross_entropy(&x, &head, &labels);
        let (once, scaled) = (loss()?.backward()?, (loss()? * 131_072.)?.backward()?);
        let wide =
            |grads: &candle_core::backprop::GradStore| grads.get(&x).unwrap().to_dtype(DType::F32);
        let (once, scaled) = (wide(&once)?, wide(&scaled)?);
        // In F16 the scale itself is infinite.
        assert!(apart(&(scaled / 131_072.)?, &once)? < 1e-4);
        Ok(())
    }

    #[test]
    fn a_head_whose_weight_is_computed_is_refused() -> Result<()> {
        let var = Var::from_tensor(&normal((5, CLASSES))?.to_dtype(DType::F32)?)?;
        let layer = candle_nn::Linear::new(var.t()?, None);
        let head = Linear::new(layer, LoraConfig::default(), vb()?)?;
        let (x, labels) = (Tensor::zeros((3, 5), DType::F32, &Device::Cpu)?, [1u32, 2, 3]);
        let labels = Tensor::new(&labels, &Device::Cpu)?;
        let error = linear_cross_entropy(&x, &head, &labels).unwrap_err().to_string();
        assert!(error.contains("expected the variables themselves"), "{error}");
        Ok(())
    }

    #[test]
    fn nothing_to_train_records_no_graph() -> Result<()> {
        let head = head(DType::F32)?;
        let head = Linear::new(head.into_merged()?, LoraConfig::default(), vb()?)?;
        let x = Tensor::zeros((3, 5), DType::F32, &Device::Cpu)?;
        let labels = Tensor::zeros(3, DType::U8, &Device::Cpu)?;
        assert!(!linear_cross_entropy(&x, &head, &labels)?.track_op());
        Ok(())
    }

    fn vb() -> Result<VarBuilder<'static>> {
        Ok(VarBuilder::from_tensors(HashMap::new(), DType::F32, &Device::Cpu))
    }

    #[test]
    fn labels_that_do_not_fit_are_errors() -> Result<()> {
        let (head, x) = (head(DType::F32)?, Tensor::zeros((2, 5), DType::F32, &Device::Cpu)?);
        let error = |labels: Tensor| linear_cross_entropy(&x, &head, &labels).unwrap_err();
        let labels = |values: [i64; 2]| Tensor::new(&values, &Device::Cpu);
        assert!(error(labels([0, 30])?).to_string().contains("label 30 at position 1"));
        assert!(error(labels([-1, -100])?).to_string().contains("no label counts"));
        assert!(error(labels([0, 0])?.unsqueeze(0)?).to_string().contains("[1, 2]"));
        assert!(error(labels([0, 0])?.to_dtype(DType::F32)?).to_string().contains("F32"));
        Ok(())
    }
}
