//! Edge cases: empty inputs, sizes around the kernels' blocks, views, other adapter dtypes.

use crate::common::{bits, device, difference, rnd, CFG};
use crate::contract::{check, dense::linear_plain, Case};
use candle_core::{DType, Module, Result, Tensor, Var};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder, VarMap};
use lora::{LoraConfig, LoraModule};
use loralib as lora;

#[test]
fn linear_over_several_row_blocks() -> Result<()> {
    check(&Case {
        name: "Linear of 300 rows",
        weight: &[257, 33],
        bias: Some(257),
        input: &rnd(3, &[300, 33], DType::F64)?,
        cfg: CFG,
        make: &|cfg, vb| lora::linear(33, 257, cfg, vb),
        plain: &linear_plain,
    })
}

/// A Linear's output against the formula, on views with offsets and strides.
#[test]
fn update_agrees_at_every_rank_and_width() -> Result<()> {
    for (r, n) in [(1, 3), (3, 700), (4, 64), (7, 300), (16, 513), (32, 40), (33, 700), (64, 65)] {
        let x = rnd(1, &[9, 20, 5], DType::F64)?.transpose(1, 2)?.narrow(0, 1, 7)?;
        // For odd n the weight's rows have a gap between them.
        let w = rnd(2, &[n + 3, 20 + n % 2], DType::F64)?.narrow(0, 2, n)?.narrow(1, 0, 20)?;
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &device());
        let base = candle_nn::Linear::new(w.clone(), None);
        let layer = lora::Linear::new(base, LoraConfig { r, ..CFG }, vb)?;
        for (seed, var) in vars.data().lock().unwrap().values().enumerate() {
            var.set(&rnd(5 + seed as u64, var.dims(), DType::F64)?)?;
        }
        let (a, b) = (layer.lora_a().unwrap(), layer.lora_b().unwrap());
        let x2 = x.contiguous()?.reshape(((), 20))?;
        let update = (x2.matmul(&a.t()?)?.matmul(&b.t()?)? * (3. / r as f64))?;
        let expected = (x2.matmul(&w.t()?.contiguous()?)? + update)?.reshape((7, 5, n))?;
        assert!(difference(&layer.forward(&x)?, &expected)? < 1e-13, "r {r}, {n} outputs");
    }
    Ok(())
}

#[test]
fn empty_inputs_give_empty_outputs() -> Result<()> {
    let vb = || VarBuilder::zeros(DType::F32, &device());
    let y =
        lora::linear(6, 5, CFG, vb())?.forward(&Tensor::zeros((0, 6), DType::F32, &device())?)?;
    assert_eq!(y.dims(), [0, 5]);
    let conv_cfg = Conv1dConfig { padding: 2, ..Default::default() };
    let dropout = LoraConfig { lora_dropout: 0.5, ..CFG };
    let conv = lora::conv1d(3, 4, 3, conv_cfg, dropout, vb())?;
    let y = conv.forward(&Tensor::zeros((0, 3, 5), DType::F32, &device())?)?;
    assert_eq!(y.dims(), [0, 4, 7]);
    let y = conv.forward(&Tensor::zeros((2, 3, 0), DType::F32, &device())?)?;
    assert_eq!(y.dims(), [2, 4, 2]);
    let ids = Tensor::zeros((2, 0), DType::U32, &device())?;
    assert_eq!(lora::embedding(5, 3, CFG, vb())?.forward(&ids)?.dims(), [2, 0, 3]);
    Ok(())
}

/// As torch's: none would stop an optimizer that expects one for each variable.
#[test]
fn empty_inputs_give_zero_gradients() -> Result<()> {
    type Make<'a> = &'a dyn Fn(LoraConfig, VarBuilder) -> Result<Box<dyn Module>>;
    let conv = |cfg, vb: VarBuilder| lora::conv2d(3, 4, 3, Conv2dConfig::default(), cfg, vb);
    let layers: [(&[usize], Make); 6] = [
        (&[0, 6], &|cfg, vb| Ok(Box::new(lora::linear(6, 5, cfg, vb)?))),
        (&[2, 0, 6], &|cfg, vb| Ok(Box::new(lora::linear(6, 5, cfg, vb)?))),
        (&[0, 6], &|cfg, vb| {
            Ok(Box::new(lora::merged_linear(6, 9, &[true, false, true], cfg, vb)?))
        }),
        (&[0, 3, 5], &|cfg, vb| Ok(Box::new(lora::conv1d(3, 4, 3, Default::default(), cfg, vb)?))),
        (&[0, 3, 5, 4], &|cfg, vb| Ok(Box::new(conv(cfg, vb)?))),
        (&[2, 0], &|cfg, vb| Ok(Box::new(lora::embedding(7, 6, cfg, vb)?))),
    ];
    let dropout = LoraConfig { lora_dropout: 0.5, ..CFG };
    for (dims, make) in layers {
        let ids = dims == [2, 0];
        for cfg in
            [CFG, LoraConfig { r: 0, ..CFG }, dropout].into_iter().take(if ids { 2 } else { 3 })
        {
            let vars = VarMap::new();
            let layer = make(cfg, VarBuilder::from_varmap(&vars, DType::F32, &device()))?;
            let x = Var::from_tensor(&Tensor::zeros(dims, DType::F32, &device())?)?;
            let input = if ids { x.to_dtype(DType::U32)?.detach() } else { x.as_tensor().clone() };
            let grads = layer.forward(&input)?.sum_all()?.backward()?;
            let trained =
                if cfg.r > 0 { vec!["lora_A", "lora_B", "bias"] } else { vec!["weight", "bias"] };
            for (name, var) in vars.data().lock().unwrap().iter() {
                if trained.contains(&name.as_str()) {
                    let grad = grads.get(var).unwrap_or_else(|| panic!("{name} of {dims:?}"));
                    assert_eq!(grad.dims(), var.dims());
                    assert_eq!(difference(grad, &grad.zeros_like()?)?, 0., "{name} of {dims:?}");
                }
            }
            assert!(ids || grads.get(&x).is_some_and(|grad| grad.dims() == dims), "{dims:?}");
        }
    }
    Ok(())
}

#[test]
fn adapter_dtype_and_rank_stabilised_scaling() -> Result<()> {
    let vb = VarBuilder::zeros(DType::F32, &device());
    let cfg = LoraConfig { r: 4, lora_dtype: Some(DType::BF16), rslora: true, ..CFG };
    let layer = lora::linear(6, 5, cfg, vb)?;
    assert_eq!(layer.scaling(), 1.5);
    assert_eq!(layer.lora_a().map(Tensor::dtype), Some(DType::BF16));
    assert_eq!(layer.forward(&rnd(1, &[2, 6], DType::F32)?)?.dtype(), DType::F32);
    Ok(())
}

#[test]
fn merged_weight_is_a_copy() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device());
    let mut layer = lora::linear(6, 5, CFG, vb)?;
    let x = rnd(1, &[2, 6], DType::F32)?;
    layer.eval()?;
    let (before, plain) = (layer.forward(&x)?, layer.clone().into_merged()?);
    for var in vars.data().lock().unwrap().values() {
        var.set(&rnd(9, var.dims(), DType::F32)?)?;
    }
    assert_eq!(bits(&layer.forward(&x)?)?, bits(&before)?);
    // candle's own matmul rounds differently.
    assert!(difference(&plain.forward(&x)?, &before)? < 1e-6);
    layer.eval()?;
    assert!(difference(&layer.forward(&x)?, &before)? > 1e-2);
    Ok(())
}
