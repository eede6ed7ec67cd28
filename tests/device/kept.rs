//! What the backward keeps: gradients of the trained variables and no others.

use crate::common::{bits, device, difference, faer, rnd, CFG};
use candle_core::{DType, Module, Result, Tensor, Var};
use candle_nn::{Conv1dConfig, Conv2dConfig, Linear, VarBuilder, VarMap};
use lora::{Bias, LoraConfig, LoraModule};
use loralib as lora;
use std::collections::HashMap;

#[test]
fn plain_layers_train_all_variables() -> Result<()> {
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

/// Sums of whole numbers are exact in any order. Other sums equal candle's bit for bit if the GEMM is
/// candle's, and differ by rounding if it is not.
#[test]
fn frozen_linear_agrees_with_candle() -> Result<()> {
    for (dtype, rounding) in [(DType::F32, 1e-6), (DType::F64, 1e-14)] {
        for whole in [true, false] {
            let rnd = |seed, dims: &[usize]| {
                let values = rnd(seed, dims, dtype)?;
                if whole {
                    (values * 9.)?.round()
                } else {
                    Ok(values)
                }
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
                if whole || !faer() {
                    assert_eq!(bits(a)?, bits(b)?, "{dtype:?}");
                } else {
                    assert!(difference(a, b)? < rounding, "{dtype:?}");
                }
            }
            assert_eq!(ours.get_ids().count(), 1);
            assert!(theirs.get_ids().count() > 1, "candle also keeps those of frozen tensors");
        }
    }
    Ok(())
}

#[test]
fn models_keep_gradients_of_adapters_only() -> Result<()> {
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
    assert_eq!(kept, 3 * 2 * 4 * dim, "gradients of A and B only");
    Ok(())
}

#[test]
fn one_var_map_freezes_adapted_bases() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device());
    let mut layer = lora::linear(6, 5, CFG, vb)?;
    let x = rnd(1, &[3, 6], DType::F32)?;
    let grads = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
    let kept = |name: &str| grads.get(&vars.data().lock().unwrap()[name]).is_some();
    assert!(kept("lora_A") && kept("lora_B") && kept("bias") && !kept("weight"));
    assert_eq!(lora::missing_grads(&vars, &grads), Vec::<String>::new());
    // The layer uses a new value of the base's variable.
    let old = layer.forward(&x)?;
    vars.data().lock().unwrap()["weight"].set(&rnd(8, &[5, 6], DType::F32)?)?;
    assert!(difference(&layer.forward(&x)?, &old)? > 0.1);
    layer.eval()?;
    assert!(!layer.forward(&x)?.track_op());
    Ok(())
}

#[test]
fn convolutions_with_dropout_freeze_the_base() -> Result<()> {
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

#[test]
fn trained_bias_keeps_only_its_gradient() -> Result<()> {
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
fn missing_grads_names_layers_before_a_fused_operation() -> Result<()> {
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
