//! Gradients against finite differences, in F64, for every layer; and what backward keeps.

use crate::common::{bits, device, difference, rnd, values, CFG};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Conv1dConfig, Conv2dConfig, Linear, VarBuilder, VarMap};
use lora::{Adapted, Bias, Conv3dConfig, LoraConfig, LoraModule};
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
    let x = match x.dtype().is_float() {
        true => {
            let x = Var::from_tensor(x)?;
            vars.push(("input".to_owned(), x.clone()));
            x.into_inner()
        }
        false => x.clone(),
    };
    let probe = rnd(5, layer.forward(&x)?.dims(), DType::F64)?;
    // A loss with curvature, so that a gradient of the wrong point does not pass.
    let loss = || (layer.forward(&x)?.sin()? * &probe)?.sum_all();
    let grads = loss()?.backward()?;
    // candle keeps one for the probe, an operand of its own product.
    assert_eq!(grads.get_ids().count(), vars.len() + 1, "{name}: gradients of variables alone");
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
    // The embedding has no bias to ask for.
    check("Embedding", &[5, 3], 0, &ids, |vb| lora::embedding(5, 3, CFG, vb))
}

#[test]
fn convolutions_with_batches_groups_dilation_and_stride_remainders() -> Result<()> {
    for groups in [1, 2] {
        for (padding, stride, dilation, k) in
            [(0, 1, 1, 3), (1, 2, 1, 3), (1, 1, 2, 2), (2, 3, 1, 2)]
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

#[test]
fn a_plain_layer_of_variables_trains_them_all() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &device());
    let none = LoraConfig::default();
    let layer = lora::linear(4, 5, none, vb.pp("a"))?;
    let conv = lora::conv1d(2, 3, 3, Conv1dConfig::default(), none, vb.pp("b"))?;
    let table = lora::embedding(6, 4, none, vb.pp("c"))?;
    let x = table.forward(&Tensor::new(&[[1u32, 2], [0, 5]], &device())?)?;
    let y = layer.forward(&x)?.transpose(1, 2)?.contiguous()?.reshape((2, 2, 5))?;
    let grads = conv.forward(&y)?.sqr()?.sum_all()?.backward()?;
    assert_eq!(lora::missing_grads(&vars, &grads), Vec::<String>::new());
    assert_eq!(grads.get_ids().count(), 5);
    Ok(())
}

/// Whether the products are candle's own.
fn of_candle() -> bool {
    let faer = cfg!(all(
        feature = "faer",
        target_arch = "x86_64",
        not(any(feature = "mkl", feature = "accelerate"))
    ));
    !(faer && device().is_cpu())
}

/// Sums of whole numbers are exact in any order. Those of others are candle's to the bit where the
/// product is candle's own, and else apart by roundings.
#[test]
fn the_frozen_product_s_gradient_is_candle_s_and_the_weight_s_is_not_kept() -> Result<()> {
    for (dtype, rounding) in [(DType::F32, 1e-6), (DType::F64, 1e-14)] {
        for whole in [true, false] {
            let rnd = |seed, dims: &[usize]| match whole {
                true => (rnd(seed, dims, dtype)? * 9.)?.round(),
                false => rnd(seed, dims, dtype),
            };
            let x = Var::from_tensor(&rnd(1, &[70, 133])?)?;
            let plain = Linear::new(rnd(2, &[117, 133])?, Some(rnd(3, &[117])?));
            let ours = lora::Linear::new(
                plain.clone(),
                LoraConfig::default(),
                VarBuilder::zeros(dtype, &device()),
            )?;
            let backward = |layer: &dyn Module| {
                let y = layer.forward(&x)?;
                y.sqr()?.sum_all()?.backward().map(|grads| (y, grads))
            };
            let ((y1, ours), (y2, theirs)) = (backward(&ours)?, backward(&plain)?);
            for (a, b) in [(&y1, &y2), (ours.get(&x).unwrap(), theirs.get(&x).unwrap())] {
                if whole || of_candle() {
                    assert_eq!(bits(a)?, bits(b)?, "{dtype:?}");
                } else {
                    assert!(difference(a, b)? < rounding, "{dtype:?}");
                }
            }
            assert_eq!(ours.get_ids().count(), 1);
            assert!(theirs.get_ids().count() > 1, "candle keeps gradients of what is frozen");
        }
    }
    Ok(())
}

#[test]
fn a_model_with_a_frozen_base_keeps_gradients_of_its_adapters_and_of_nothing_else() -> Result<()> {
    let (dim, layers) = (64, 4);
    let adapter = VarMap::new();
    let mut base = HashMap::new();
    for i in 0..layers {
        base.insert(format!("{i}.weight"), (rnd(i, &[dim, dim], DType::F32)? * 0.1)?);
        base.insert(format!("{i}.bias"), rnd(i, &[dim], DType::F32)?);
    }
    let vb = VarBuilder::from_tensors(base, DType::F32, &device());
    let vb = lora::var_builder(vb, &adapter, Bias::None);
    let model = (0..layers)
        .map(|i| {
            // A frozen plain layer between the adapted ones.
            let r = if i == 1 { 0 } else { 4 };
            lora::linear(dim, dim, LoraConfig { r, ..CFG }, vb.pp(i))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut y = rnd(9, &[8, dim], DType::F32)?;
    for layer in &model {
        y = layer.forward(&y)?.gelu()?;
    }
    let grads = y.sqr()?.mean_all()?.backward()?;
    let vars = lora::mark_only_lora_as_trainable(&adapter, Bias::None).unwrap();
    assert_eq!(grads.get_ids().count(), vars.len());
    let kept: usize = vars.iter().map(|var| grads.get(var).unwrap().elem_count()).sum();
    assert_eq!(kept, 3 * 2 * 4 * dim, "the adapter's own, exactly");
    Ok(())
}

#[test]
fn one_map_for_all_freezes_the_base_of_adapted_layers() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device());
    let mut layer = lora::linear(6, 5, CFG, vb)?;
    let x = rnd(1, &[3, 6], DType::F32)?;
    let grads = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
    let kept = |name: &str| grads.get(&vars.data().lock().unwrap()[name]).is_some();
    assert!(kept("lora_A") && kept("lora_B") && kept("bias") && !kept("weight"));
    assert_eq!(lora::missing_grads(&vars, &grads), Vec::<String>::new());
    // A new value of the base's variable is the layer's.
    let old = layer.forward(&x)?;
    vars.data().lock().unwrap()["weight"].set(&rnd(8, &[5, 6], DType::F32)?)?;
    assert!(difference(&layer.forward(&x)?, &old)? > 0.1);
    layer.eval()?;
    assert!(!layer.forward(&x)?.track_op());
    Ok(())
}

#[test]
fn dropout_in_a_convolution_leaves_a_base_of_variables_frozen() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device());
    let cfg = LoraConfig { lora_dropout: 0.3, ..CFG };
    let layer = lora::conv2d_no_bias(3, 4, 3, Conv2dConfig::default(), cfg, vb)?;
    let x = Var::from_tensor(&rnd(1, &[2, 3, 6, 6], DType::F32)?)?;
    for x in [x.detach(), x.into_inner()] {
        let grads = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
        assert!(grads.get(&vars.data().lock().unwrap()["weight"]).is_none());
        assert_eq!(grads.get_ids().count(), 2 + usize::from(x.is_variable()));
    }
    Ok(())
}

/// With A and B the identity the update shows the mask: y = x·Wᵀ + s·x∘mask.
#[test]
fn gradients_see_the_mask_of_dropout() -> Result<()> {
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
        assert!(m.abs() < 1e-6 || (m - 1. / 0.6).abs() < 1e-6, "{m} is no value of a mask");
    }
    let dropped = mask_values.iter().filter(|m| **m < 0.1).count();
    let share = dropped as f64 / mask_values.len() as f64;
    assert!((share - 0.4).abs() < 0.07, "{share} were dropped"); // seven standard errors
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

#[test]
fn a_trained_bias_of_a_first_layer_keeps_its_own_gradient_alone() -> Result<()> {
    let base = HashMap::from([
        ("weight".to_owned(), rnd(1, &[4, 3, 3], DType::F32)?),
        ("bias".to_owned(), rnd(2, &[4], DType::F32)?),
    ]);
    let vars = VarMap::new();
    let vb = VarBuilder::from_tensors(base, DType::F32, &device());
    let vb = lora::var_builder(vb, &vars, Bias::All);
    let none = LoraConfig::default();
    let layer = lora::conv1d(3, 4, 3, Conv1dConfig::default(), none, vb)?;
    let grads = layer.forward(&rnd(3, &[2, 3, 8], DType::F32)?)?.sum_all()?.backward()?;
    assert_eq!(grads.get_ids().count(), 1);
    Ok(())
}

#[test]
fn missing_grads_names_what_a_fused_operation_cut_off() -> Result<()> {
    let adapter = VarMap::new();
    let vb = VarBuilder::zeros(DType::F32, &device());
    let vb = lora::var_builder(vb, &adapter, Bias::None);
    let (a, b) = (lora::linear(4, 4, CFG, vb.pp("a"))?, lora::linear(4, 4, CFG, vb.pp("b"))?);
    let x = rnd(1, &[2, 4], DType::F32)?;
    let cut = candle_nn::ops::softmax_last_dim(&a.forward(&x)?.contiguous()?)?;
    let grads = b.forward(&cut)?.sum_all()?.backward()?;
    assert_eq!(lora::missing_grads(&adapter, &grads), ["a.lora_A", "a.lora_B"]);
    Ok(())
}
