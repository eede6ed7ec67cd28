//! Gradients against finite differences, in F64, for every layer.

use crate::common::{device, difference, rnd, values, CFG};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Conv1dConfig, Conv2dConfig, Linear, VarBuilder, VarMap};
use lora::layers::{Adapted, Conv3dConfig};
use lora::{Bias, LoraConfig};
use loralib as lora;
use std::collections::HashMap;

/// Compares the gradient of each variable, and of the input, with central differences.
fn check<K>(
    name: &str,
    weight: &[usize],
    bias: usize,
    x: &Tensor,
    make: impl Fn(VarBuilder) -> Result<Adapted<K>>,
) -> Result<()>
where
    Adapted<K>: Module,
{
    let base = HashMap::from([
        ("weight".to_owned(), rnd(1, weight, DType::F64)?),
        ("bias".to_owned(), rnd(2, &[bias], DType::F64)?),
    ]);
    let adapter = VarMap::new();
    let base = VarBuilder::from_tensors(base, DType::F64, &device());
    let layer = make(lora::var_builder(base, &adapter, Bias::All))?;
    let mut vars = vec![];
    for (seed, (name, var)) in adapter.data().lock().unwrap().iter().enumerate() {
        var.set(&rnd(20 + seed as u64, var.dims(), DType::F64)?)?;
        vars.push((name.clone(), var.clone()));
    }
    let x = if x.dtype().is_float() {
        let x = Var::from_tensor(x)?;
        vars.push(("input".to_owned(), x.clone()));
        x.into_inner()
    } else {
        x.clone()
    };
    let probe = rnd(5, layer.forward(&x)?.dims(), DType::F64)?;
    // A nonlinear loss, so that a gradient at another point does not pass.
    let loss = || (layer.forward(&x)?.sin()? * &probe)?.sum_all();
    let grads = loss()?.backward()?;
    // candle keeps one for the probe, an operand of its multiplication.
    assert_eq!(grads.get_ids().count(), vars.len() + 1, "{name}: gradients of variables only");
    for (variable, var) in vars {
        let grad = grads.get(&var).unwrap_or_else(|| panic!("{name}: {variable} has no gradient"));
        assert_eq!(grad.dims(), var.dims());
        let (at, grad) = (values(&var)?, values(grad)?);
        let eps = 1e-5;
        for (i, grad) in grad.into_iter().enumerate() {
            let shifted = |by: f64| {
                let mut at = at.clone();
                at[i] += by;
                var.set(&Tensor::from_vec(at, var.dims(), &Device::Cpu)?)?;
                loss()?.to_scalar::<f64>()
            };
            let numeric = (shifted(eps)? - shifted(-eps)?) / (2. * eps);
            let apart = (numeric - grad).abs() / numeric.abs().max(1.);
            assert!(apart < 1e-6, "{name}: {variable}[{i}] is {grad}, numerically {numeric}");
        }
        var.set(&Tensor::from_vec(at, var.dims(), &Device::Cpu)?)?;
    }
    Ok(())
}

#[test]
fn linear() -> Result<()> {
    let x = rnd(3, &[2, 3, 4], DType::F64)?;
    check("Linear", &[5, 4], 5, &x, |vb| lora::linear(4, 5, CFG, vb))?;
    let cfg = LoraConfig { fan_in_fan_out: true, ..CFG };
    check("Linear, (in, out)", &[4, 5], 5, &x, |vb| lora::linear(4, 5, cfg, vb))?;
    let strided = rnd(3, &[4, 3, 2], DType::F64)?.t()?.transpose(0, 2)?;
    check("Linear, strided input", &[5, 4], 5, &strided, |vb| lora::linear(4, 5, CFG, vb))
}

#[test]
fn merged_linear() -> Result<()> {
    let x = rnd(3, &[3, 4], DType::F64)?;
    for enable in [[true, false, true], [false, true, false], [true, true, true]] {
        check("MergedLinear", &[6, 4], 6, &x, |vb| lora::merged_linear(4, 6, &enable, CFG, vb))?;
    }
    Ok(())
}

#[test]
fn embedding() -> Result<()> {
    let ids = Tensor::new(&[[0u32, 4], [4, 2]], &device())?;
    // The embedding has no bias.
    check("Embedding", &[5, 3], 0, &ids, |vb| lora::embedding(5, 3, CFG, vb))
}

#[test]
fn convolutions() -> Result<()> {
    for groups in [1, 2] {
        for (padding, stride, dilation, k) in
            [(0, 1, 1, 3), (1, 2, 1, 3), (1, 1, 2, 2), (2, 3, 1, 2), (2, 1, 3, 2), (2, 2, 4, 2)]
        {
            let name = |n| format!("Conv{n}d k {k} g {groups} p {padding} s {stride} d {dilation}");
            let cfg = Conv1dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            let x = rnd(3, &[2, 4, 8], DType::F64)?;
            let weight = [4, 4 / groups, k];
            check(&name(1), &weight, 4, &x, |vb| lora::conv1d(4, 4, k, cfg, CFG, vb))?;
            let cfg = Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            let x = rnd(3, &[2, 4, 7, 8], DType::F64)?;
            let weight = [4, 4 / groups, k, k];
            check(&name(2), &weight, 4, &x, |vb| lora::conv2d(4, 4, k, cfg, CFG, vb))?;
            let cfg = Conv3dConfig { padding, stride, dilation, groups };
            let x = rnd(3, &[2, 2, 3, 4, 5], DType::F64)?;
            let weight = [2, 2 / groups, k, k, k];
            check(&name(3), &weight, 2, &x, |vb| lora::conv3d(2, 2, k, cfg, CFG, vb))?;
        }
    }
    Ok(())
}

/// With A and B the identity the update shows the mask: y = x·Wᵀ + s·x∘mask.
#[test]
fn gradients_use_the_dropout_mask() -> Result<()> {
    let (n, rows) = (6, 400);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &device());
    let w = rnd(1, &[n, n], DType::F64)?;
    let cfg = LoraConfig { r: n, lora_alpha: 3. * n as f64, lora_dropout: 0.4, ..CFG };
    let layer = lora::Linear::new(Linear::new(w.clone(), None), cfg, vb)?;
    let one = Tensor::eye(n, DType::F64, &device())?;
    for var in vars.data().lock().unwrap().values() {
        var.set(&one)?;
    }
    let x = Var::from_tensor(&rnd(2, &[rows, n], DType::F64)?)?;
    let y = layer.forward(&x)?;
    let mask = ((&y - x.matmul(&w.t()?)?)? / 3.)?.detach().div(&x.detach())?;
    let mask_values = values(&mask)?;
    for m in &mask_values {
        assert!(m.abs() < 1e-6 || (m - 1. / 0.6).abs() < 1e-6, "{m} is not a value of a mask");
    }
    let dropped = mask_values.iter().filter(|m| **m < 0.1).count();
    let share = dropped as f64 / mask_values.len() as f64;
    assert!((share - 0.4).abs() < 0.07, "a share of {share} was dropped"); // seven standard errors
    let probe = rnd(3, &[rows, n], DType::F64)?;
    let grads = (&y * &probe)?.sum_all()?.backward()?;
    let dropped = (x.detach() * &mask)?;
    let (a, b) = (layer.lora_a().unwrap(), layer.lora_b().unwrap());
    let expected = (probe.t()?.matmul(&dropped)? * 3.)?;
    assert!(difference(grads.get(a).unwrap(), &expected)? < 1e-9);
    assert!(difference(grads.get(b).unwrap(), &expected)? < 1e-9);
    let expected = (probe.matmul(&w)? + (&probe * &mask)? * 3.)?;
    assert!(difference(grads.get(&x).unwrap(), &expected)? < 1e-9);
    Ok(())
}
