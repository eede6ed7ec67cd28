//! DoRA with dropout, as PEFT has it: a dropped input passes through the base, and what is kept through the effective
//! weight.

use crate::common::{device, difference, rnd, values, CFG};
use crate::golden::case::dora_tensors;
use candle_core::{DType, Module, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap};
use lora::LoraConfig;
use loralib as lora;

const SCALING: f64 = 1.5;

/// The operands of a layer (out, in) by name, as variables.
fn variables(get: impl Fn(&str) -> Result<Tensor>) -> Result<[Var; 4]> {
    let [x, a, b, m] = ["x", "lora_A", "lora_B", "lora_magnitude_vector"]
        .map(|name| Var::from_tensor(&get(name)?));
    Ok([x?, a?, b?, m?])
}

/// The formula in candle's operations, whose gradients are candle's.
fn formula([x, a, b, m]: [&Tensor; 4], w: &Tensor, bias: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let kept = (x * mask)?;
    let effective = (w + (b.matmul(a)? * SCALING)?)?;
    let norms = effective.sqr()?.sum(1)?.sqrt()?.detach();
    let scaled = kept.matmul(&effective.t()?)?.broadcast_mul(&(m / norms)?)?;
    (scaled + (x - kept)?.matmul(&w.t()?)?)?.broadcast_add(bias)
}

#[test]
fn the_formula_with_dropout_is_peft_s() -> Result<()> {
    let all = dora_tensors()?;
    let get = |name: &str| all[&format!("Linear.dora_dropout/{name}")].clone();
    let vars = variables(|name| Ok(get(name)))?;
    let [x, a, b, m] = &vars;
    let y = formula([x, a, b, m], &get("weight"), &get("bias"), &get("mask"))?;
    assert!(difference(&y, &get("y"))? < 1e-13);
    let grads = (y * get("probe"))?.sum_all()?.backward()?;
    for (name, var) in ["x", "lora_A", "lora_B", "lora_magnitude_vector"].iter().zip(&vars) {
        let apart = difference(grads.get(var).unwrap(), &get(&format!("grad.{name}")))?;
        assert!(apart < 1e-13, "{name}: {apart}");
    }
    Ok(())
}

/// Each row of three inputs has one of eight masks.
#[test]
fn a_layer_with_dropout_computes_the_formula() -> Result<()> {
    let (rows, inputs, outputs) = (200, 3, 5);
    let w = rnd(1, &[outputs, inputs], DType::F64)?;
    let bias = rnd(2, &[outputs], DType::F64)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &device());
    let cfg =
        LoraConfig { r: 2, lora_alpha: 2. * SCALING, lora_dropout: 0.4, use_dora: true, ..CFG };
    let layer = lora::Linear::new(Linear::new(w.clone(), Some(bias.clone())), cfg, vb)?;
    for (seed, var) in vars.data().lock().unwrap().values().enumerate() {
        var.set(&rnd(3 + seed as u64, var.dims(), DType::F64)?)?;
    }
    let x = Var::from_tensor(&rnd(6, &[rows, inputs], DType::F64)?)?;
    let y = layer.forward(&x)?;

    let get = |last: &str| vars.data().lock().unwrap()[last].clone();
    let [a, b, m] = ["lora_A", "lora_B", "lora_magnitude_vector"].map(get);
    let operands = [x.as_tensor(), &a, &b, &m];
    let mut found = vec![None; rows];
    for bits in 0..8u32 {
        let row: Vec<_> = (0..3).map(|i| f64::from(bits >> i & 1) / 0.6).collect();
        let mask = Tensor::new(row.clone(), &device())?.broadcast_as((rows, inputs))?;
        let apart = (formula(operands, &w, &bias, &mask)? - &y)?.abs()?.max(1)?;
        for (found, apart) in found.iter_mut().zip(values(&apart)?) {
            // The factor 1/(1 - p) is in F32.
            if apart < 1e-5 {
                assert!(found.replace(row.clone()).is_none(), "two masks give one output");
            }
        }
    }
    let mask: Option<Vec<_>> = found.into_iter().collect();
    let mask = mask.expect("a row that no mask gives").concat();
    let kept = mask.iter().filter(|m| **m > 0.).count() as f64 / mask.len() as f64;
    assert!((kept - 0.6).abs() < 0.14, "{kept} kept"); // seven standard errors
    let mask = Tensor::from_vec(mask, (rows, inputs), &device())?;

    let probe = rnd(7, &[rows, outputs], DType::F64)?;
    let ours = (y * &probe)?.sum_all()?.backward()?;
    let expected = (formula(operands, &w, &bias, &mask)? * probe)?.sum_all()?.backward()?;
    for (name, var) in ["x", "lora_A", "lora_B", "magnitude"].iter().zip([&x, &a, &b, &m]) {
        let apart = difference(ours.get(var).unwrap(), expected.get(var).unwrap())?;
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    Ok(())
}
