//! `linear_cross_entropy` beside the loss of all logits at once, over heads of every kind.

use crate::common::{difference, randn};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::loss::cross_entropy;
use loralib::nn::{linear_no_bias, Linear};
use loralib::train::linear_cross_entropy;
use loralib::{Adapter, Adapters, LoraConfig, Result};
use std::collections::{BTreeMap, HashMap};

const CPU: Device = Device::Cpu;
const HIDDEN: usize = 6;
const CLASSES: usize = 40;
const ROWS: usize = 9;

fn base(dtype: DType) -> Result<candle_nn::VarBuilder<'static>> {
    let weight = randn(&[CLASSES, HIDDEN], DType::F64, &CPU)?.to_dtype(dtype)?;
    let tensors = HashMap::from([("head.weight".to_owned(), weight)]);
    Ok(candle_nn::VarBuilder::from_tensors(tensors, dtype, &CPU))
}

fn head(vb: candle_nn::VarBuilder) -> Result<Linear> {
    Ok(linear_no_bias(HIDDEN, CLASSES, vb.pp("head"))?)
}

fn adapter(use_dora: bool) -> Adapter {
    let cfg = LoraConfig { r: 3, lora_alpha: 5., use_dora, ..Default::default() };
    Adapter::new(cfg).targets(["head"])
}

/// Makes B random, so that A has a gradient.
fn randomize(adapter: &Adapter) -> Result<()> {
    for (name, var) in adapter.named_vars()? {
        if name.ends_with("lora_B") {
            var.set(&randn(var.dims(), DType::F64, &CPU)?.to_dtype(var.dtype())?)?;
        }
    }
    Ok(())
}

fn labels() -> Result<Tensor> {
    Ok(Tensor::from_iter((0..ROWS as i64).map(|i| i * 7 % CLASSES as i64), &CPU)?)
}

/// Both losses agree, and the gradients of these variables, which `run` makes available.
fn agree(
    head: &Linear,
    vars: BTreeMap<String, Var>,
    run: impl Fn(&(dyn Fn() -> Result<Tensor> + Sync)) -> Result<Tensor>,
) -> Result<()> {
    let x = Var::from_tensor(&randn(&[ROWS, HIDDEN], DType::F64, &CPU)?)?;
    let labels = labels()?;
    let fused = run(&|| Ok(linear_cross_entropy(&x, head, &labels)?))?;
    let composed = run(&|| Ok(cross_entropy(&head.forward(&x)?, &labels)?))?;
    assert!(difference(&fused, &composed)? < 1e-12);
    let (fused, composed) = ((fused * 3.)?.backward()?, (composed * 3.)?.backward()?);
    for (name, var) in vars.into_iter().chain([("x".to_owned(), x)]) {
        let of = |grads: &GradStore| grads.get(&var).cloned();
        let (Some(grad), Some(expected)) = (of(&fused), of(&composed)) else {
            panic!("{name} has no gradient")
        };
        assert!(expected.abs()?.max_all()?.to_scalar::<f64>()? > 1e-6, "{name}");
        assert!(difference(&grad, &expected)? < 1e-12, "{name}");
    }
    Ok(())
}

#[test]
fn an_adapted_head_has_its_gradients_with_and_without_dora() -> Result<()> {
    for use_dora in [false, true] {
        let adapter = adapter(use_dora);
        let head = head(adapter.var_builder(base(DType::F64)?))?;
        randomize(&adapter)?;
        agree(&head, adapter.named_vars()?, |loss| loss())?;
    }
    Ok(())
}

#[test]
fn a_chosen_and_a_summed_head_have_their_gradients() -> Result<()> {
    let adapters = Adapters::new();
    let head = head(adapters.var_builder(base(DType::F64)?))?;
    let (a, b, dora) = (adapter(false), adapter(false), adapter(true));
    for (name, adapter) in [("a", &a), ("b", &b), ("dora", &dora)] {
        adapters.add(name, adapter)?;
        randomize(adapter)?;
    }
    agree(&head, a.named_vars()?, |loss| adapters.with("a", loss))?;
    agree(&head, dora.named_vars()?, |loss| adapters.with("dora", loss))?;
    let mut both = a.named_vars()?;
    both.extend(b.named_vars()?.into_iter().map(|(name, var)| (format!("b.{name}"), var)));
    agree(&head, both, |loss| adapters.with([("a", 0.7), ("b", 0.3)], loss))?;
    // Without a choice and where the adapter is disabled only the hidden states are trained.
    agree(&head, BTreeMap::new(), |loss| loss())?;
    agree(&head, BTreeMap::new(), |loss| a.disabled(|| adapters.with("a", loss)))
}

/// Half-precision gradients at a scale, with as small an error as the composed loss has: p/count is nothing in F16.
#[test]
fn a_scaled_loss_of_a_half_precision_head_is_as_exact_as_the_composed_one() -> Result<()> {
    let (rows, classes) = (4096, 64);
    let exact_x = randn(&[rows, HIDDEN], DType::F64, &CPU)?.to_dtype(DType::F16)?;
    let exact_w = (randn(&[classes, HIDDEN], DType::F64, &CPU)? / 4.)?.to_dtype(DType::F16)?;
    let labels = Tensor::from_iter((0..rows as i64).map(|i| i * 7 % classes as i64), &CPU)?;
    type Loss = fn(&Tensor, &Linear, &Tensor) -> candle_core::Result<Tensor>;
    let fused: Loss = |x, head, labels| linear_cross_entropy(x, head, labels);
    let composed: Loss = |x, head, labels| {
        let logits = head.forward(x)?;
        let wide = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        cross_entropy(&logits.to_dtype(wide)?, labels)
    };
    let grads = |loss: Loss, dtype: DType, scale: f64| -> Result<Vec<Tensor>> {
        let (x, w) = (exact_x.to_dtype(dtype)?, exact_w.to_dtype(dtype)?);
        let (x, w) = (Var::from_tensor(&x)?, Var::from_tensor(&w)?);
        let head = Linear::new(w.as_tensor().clone(), None);
        let grads = (loss(&x, &head, &labels)? * scale)?.backward()?;
        let of = |var: &Var| Ok((grads.get(var).unwrap().to_dtype(DType::F64)? / scale)?);
        [&x, &w].into_iter().map(of).collect()
    };
    let exact = grads(composed, DType::F64, 1.)?;
    for (dtype, scale) in [(DType::F16, 65_536.), (DType::F16, 1024.), (DType::BF16, 1.)] {
        let (ours, theirs) = (grads(fused, dtype, scale)?, grads(composed, dtype, scale)?);
        for ((ours, theirs), exact) in ours.iter().zip(&theirs).zip(&exact) {
            let (ours, theirs) = (difference(ours, exact)?, difference(theirs, exact)?);
            assert!(
                ours <= theirs * 1.1 && ours < 1e-2,
                "{dtype:?} {scale}: {ours}, composed {theirs}"
            );
        }
    }
    Ok(())
}

/// The gradient of a weight is a sum over rows, which must not overflow where the mean does not.
#[test]
fn large_half_precision_states_do_not_overflow_the_gradient() -> Result<()> {
    let (rows, classes) = (256, 64);
    let x = (Tensor::ones((rows, HIDDEN), DType::F32, &CPU)? * 300.)?.to_dtype(DType::F16)?;
    let w = (randn(&[classes, HIDDEN], DType::F32, &CPU)? / 1000.)?.to_dtype(DType::F16)?;
    let (w, labels) = (Var::from_tensor(&w)?, Tensor::zeros(rows, DType::U32, &CPU)?);
    let head = Linear::new(w.as_tensor().clone(), None);
    let grad = |loss: Tensor| Ok::<_, loralib::Error>(loss.backward()?.get(&w).unwrap().clone());
    let fused = grad(linear_cross_entropy(&x, &head, &labels)?)?;
    let composed = grad(cross_entropy(&head.forward(&x)?.to_dtype(DType::F32)?, &labels)?)?;
    assert!(difference(&fused, &composed)? < 1e-2);
    Ok(())
}
