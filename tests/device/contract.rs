//! One contract, run over every layer, option and dtype.

use crate::common::{bits, device, difference, rnd, CFG};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder, VarMap};
use lora::{Adapted, Bias, Conv3dConfig, LoraConfig, LoraModule};
use loralib as lora;
use std::collections::{HashMap, HashSet};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

/// Two roundings of sums of a few dozen values, relative to the largest. F32 is F32 on a GPU too:
/// candle allows TF32 products only where a program asks for them.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 3e-6,
        DType::F16 => 5e-3,
        _ => 3e-2,
    }
}

struct Case<'a, K> {
    name: &'a str,
    weight: &'a [usize],
    bias: Option<usize>,
    input: Tensor,
    cfg: LoraConfig,
    make: &'a dyn Fn(LoraConfig, VarBuilder) -> Result<Adapted<K>>,
    /// The output of the plain candle layer into which the adapted one is merged.
    plain: &'a dyn Fn(Adapted<K>, &Tensor) -> Result<Tensor>,
}

/// What every layer is, by the compiler's word.
const fn is_a_layer<T: Module + LoraModule + Clone + std::fmt::Debug + Send + Sync>() {}
const _: () = {
    is_a_layer::<lora::Linear>();
    is_a_layer::<lora::MergedLinear>();
    is_a_layer::<lora::Embedding>();
    is_a_layer::<lora::Conv1d>();
    is_a_layer::<lora::Conv2d>();
    is_a_layer::<lora::Conv3d>();
};

fn check<K: Clone + std::fmt::Debug + Send + Sync + 'static>(case: &Case<K>) -> Result<()>
where
    Adapted<K>: Module,
{
    for dtype in DTYPES {
        contract(case, dtype).map_err(|e| e.context(format!("{} in {dtype:?}", case.name)))?;
    }
    Ok(())
}

fn contract<K: Clone + std::fmt::Debug + Send + Sync + 'static>(
    case: &Case<K>,
    dtype: DType,
) -> Result<()>
where
    Adapted<K>: Module,
{
    let name = format!("{} in {dtype:?}", case.name);
    let mut base = HashMap::from([("weight".to_owned(), rnd(1, case.weight, dtype)?)]);
    if let Some(n) = case.bias {
        base.insert("bias".to_owned(), rnd(2, &[n], dtype)?);
    }
    let frozen = || VarBuilder::from_tensors(base.clone(), dtype, &device());
    let x = match case.input.dtype().is_float() {
        true => case.input.to_dtype(dtype)?,
        false => case.input.clone(),
    };
    let adapter = VarMap::new();
    let make = |cfg| (case.make)(cfg, lora::var_builder(frozen(), &adapter, Bias::None));
    let mut layer = make(case.cfg)?;

    // A plain layer is one whose rank is 0.
    let mut plain = (case.make)(LoraConfig { r: 0, ..case.cfg }, frozen())?;
    assert!(plain.lora_a().is_none() && plain.lora_b().is_none() && plain.scaling() == 0.);
    let base_out = plain.forward(&x)?;
    assert!(!base_out.track_op(), "{name}: a frozen plain layer records no graph");
    plain.eval()?;
    assert!(!plain.is_merged());
    assert_eq!(bits(&plain.forward(&x)?)?, bits(&base_out)?, "{name}: r = 0 has one output");

    if layer.lora_a().is_none() {
        assert_eq!(bits(&layer.forward(&x)?)?, bits(&base_out)?, "{name}: nothing enabled");
        assert!(lora::mark_only_lora_as_trainable(&adapter, Bias::None).is_err());
        return layer.eval();
    }

    // A fresh layer equals its base.
    assert_eq!(layer.scaling(), 1.5);
    assert_eq!(difference(&layer.forward(&x)?, &base_out)?, 0., "{name}: a fresh update is none");
    assert_eq!(bits(&layer.merged_weight()?)?, bits(layer.weight())?, "{name}: fresh merge");

    // Random factors change it.
    for (seed, (_, var)) in adapter.data().lock().unwrap().iter().enumerate() {
        let half = matches!(dtype, DType::F16 | DType::BF16);
        assert_eq!(var.dtype(), if half { DType::F32 } else { dtype });
        var.set(&rnd(10 + seed as u64, var.dims(), var.dtype())?)?;
    }
    let train_out = layer.forward(&x)?;
    assert_eq!(train_out.dtype(), dtype);
    assert!(difference(&train_out, &base_out)? > 0.05, "{name}: the update does something");

    // Only the adapter gets gradients, and nothing else is kept.
    let grads = train_out.sqr()?.sum_all()?.backward()?;
    assert_eq!(lora::missing_grads(&adapter, &grads), Vec::<String>::new(), "{name}");
    assert_eq!(grads.get_ids().count(), 2, "{name}: gradients of A and B and of nothing else");

    // Evaluation merges, gives the same output, and records nothing.
    let (weight, saved) = (bits(layer.weight())?, lora::lora_state_dict(&adapter, Bias::None)?);
    layer.eval()?;
    assert!(layer.is_merged());
    let eval_out = layer.forward(&x)?;
    assert!(!eval_out.track_op(), "{name}: evaluation records no graph");
    assert!(difference(&eval_out, &train_out)? < tolerance(dtype), "{name}: merged = unmerged");
    assert_ne!(bits(&eval_out)?, bits(&base_out)?);
    let again = lora::lora_state_dict(&adapter, Bias::None)?;
    for (key, tensor) in &saved {
        assert_eq!(bits(tensor)?, bits(&again[key])?, "{name}: {key} is saved alike in both modes");
    }

    // Any number of rounds leaves every bit of the base and the output as it was.
    for _ in 0..3 {
        layer.eval()?;
        layer.train()?;
    }
    assert!(!layer.is_merged());
    assert_eq!(bits(layer.weight())?, weight, "{name}: the base is never written");
    assert_eq!(bits(&layer.forward(&x)?)?, bits(&train_out)?, "{name}: training is back");

    // A clone has a mode of its own.
    let mut clone = layer.clone();
    clone.eval()?;
    assert!(clone.is_merged() && !layer.is_merged());

    // Merging is candle's plain layer.
    let merged = (case.plain)(layer.clone(), &x)?;
    let apart = difference(&merged, &eval_out)?;
    assert!(apart < tolerance(dtype), "{name}: into_merged is {apart} from evaluation");

    // Without merging, evaluation adds the update, without dropout and without a graph.
    let mut unmerged = make(LoraConfig { merge_weights: false, ..case.cfg })?;
    unmerged.eval()?;
    assert!(!unmerged.is_merged());
    let out = unmerged.forward(&x)?;
    assert!(!out.track_op());
    assert_eq!(bits(&out)?, bits(&train_out)?, "{name}: unmerged evaluation");
    if x.dtype().is_float() {
        let cfg = LoraConfig { merge_weights: false, lora_dropout: 0.5, ..case.cfg };
        let mut dropping = make(cfg)?;
        let mut outs = HashSet::new();
        for _ in 0..20 {
            outs.insert(bits(&dropping.forward(&x)?)?);
        }
        assert!(outs.len() > 1, "{name}: dropout in training");
        let grads = dropping.forward(&x)?.sqr()?.sum_all()?.backward()?;
        assert_eq!(grads.get_ids().count(), 2, "{name}: gradients with dropout");
        dropping.eval()?;
        let apart = difference(&dropping.forward(&x)?, &train_out)?;
        assert!(apart < tolerance(dtype), "{name}: no dropout in evaluation");
    }

    // A merge that is not finite is an error and changes nothing.
    let a = adapter.data().lock().unwrap()["lora_A"].clone();
    a.set(&(a.ones_like()? * f64::MAX)?)?;
    assert!(layer.eval().is_err(), "{name}: a merge that is not finite");
    assert!(!layer.is_merged());
    assert!(clone.eval().is_err());
    assert!(clone.is_merged());
    assert_eq!(bits(&clone.forward(&x)?)?, bits(&eval_out)?, "{name}: the old merge stays");
    Ok(())
}

fn linear_plain(layer: lora::Linear, x: &Tensor) -> Result<Tensor> {
    // candle's own layer takes 2 to 4 dimensions.
    let flat = x.reshape(((), x.dims()[x.rank() - 1]))?;
    let y = layer.into_merged()?.forward(&flat)?;
    y.reshape([&x.dims()[..x.rank() - 1], &y.dims()[1..]].concat())
}

#[test]
fn linear() -> Result<()> {
    for (fan_in_fan_out, bias) in [(false, true), (false, false), (true, true), (true, false)] {
        for leading in [&[][..], &[1], &[7], &[2, 3], &[2, 1, 3], &[2, 1, 2, 3]] {
            check(&Case {
                name: &format!("Linear, fan_in_fan_out {fan_in_fan_out}, input {leading:?}"),
                weight: if fan_in_fan_out { &[6, 5] } else { &[5, 6] },
                bias: bias.then_some(5),
                input: rnd(3, &[leading, &[6]].concat(), DType::F64)?,
                cfg: LoraConfig { fan_in_fan_out, ..CFG },
                make: &|cfg, vb| lora::linear_b(6, 5, bias, cfg, vb),
                plain: &linear_plain,
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_linear_layer_larger_than_a_block_of_rows() -> Result<()> {
    check(&Case {
        name: "Linear of 300 rows",
        weight: &[257, 33],
        bias: Some(257),
        input: rnd(3, &[300, 33], DType::F64)?,
        cfg: CFG,
        make: &|cfg, vb| lora::linear(33, 257, cfg, vb),
        plain: &linear_plain,
    })
}

#[test]
fn merged_linear() -> Result<()> {
    let masks: [&[bool]; 6] = [
        &[true, false, true],
        &[false, true, false],
        &[true, true, true],
        &[true],
        &[false, false, true],
        &[false, false, false],
    ];
    for enable in masks {
        for fan_in_fan_out in [false, true] {
            check(&Case {
                name: &format!("MergedLinear {enable:?}, fan_in_fan_out {fan_in_fan_out}"),
                weight: if fan_in_fan_out { &[4, 9] } else { &[9, 4] },
                bias: fan_in_fan_out.then_some(9),
                input: rnd(3, &[2, 3, 4], DType::F64)?,
                cfg: LoraConfig { fan_in_fan_out, ..CFG },
                make: &|cfg, vb| match fan_in_fan_out {
                    true => lora::merged_linear(4, 9, enable, cfg, vb),
                    false => lora::merged_linear_no_bias(4, 9, enable, cfg, vb),
                },
                plain: &|layer, x| layer.into_merged()?.forward(x),
            })?;
        }
    }
    Ok(())
}

#[test]
fn merged_linear_with_splits_of_different_sizes() -> Result<()> {
    check(&Case {
        name: "MergedLinear with splits",
        weight: &[10, 4],
        bias: Some(10),
        input: rnd(3, &[3, 4], DType::F64)?,
        cfg: CFG,
        make: &|cfg, vb| {
            let base = candle_nn::linear(4, 10, vb.clone())?;
            lora::MergedLinear::with_splits(base, &[(6, true), (2, false), (2, true)], cfg, vb)
        },
        plain: &|layer, x| layer.into_merged()?.forward(x),
    })
}

#[test]
fn embedding() -> Result<()> {
    for dtype in [DType::U8, DType::U32, DType::I32, DType::I64] {
        // Devices do not convert to or from I32.
        let ids = Tensor::new(&[[0u32, 10, 3], [3, 3, 7]], &Device::Cpu)?.to_dtype(dtype)?;
        check(&Case {
            name: &format!("Embedding of {dtype:?}"),
            weight: &[11, 6],
            bias: None,
            input: ids.to_device(&device())?,
            cfg: CFG,
            make: &|cfg, vb| lora::embedding(11, 6, cfg, vb),
            plain: &|layer, _| {
                layer.into_merged()?.forward(&ids.to_dtype(DType::I64)?.to_device(&device())?)
            },
        })?;
    }
    Ok(())
}

/// candle's convolutions do not take bf16 on the CPU: widen to check against them.
fn widened(
    weight: Tensor,
    bias: Option<&Tensor>,
    x: &Tensor,
    run: impl Fn(Tensor, Option<Tensor>, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let bias = bias.map(|b| b.to_dtype(DType::F64)).transpose()?;
    run(weight.to_dtype(DType::F64)?, bias, &x.to_dtype(DType::F64)?)?.to_dtype(x.dtype())
}

#[test]
fn convolutions() -> Result<()> {
    for groups in [1, 2] {
        for (padding, stride, dilation, k, bias) in
            [(0, 1, 1, 3, true), (1, 2, 1, 3, false), (2, 1, 2, 2, true), (0, 1, 1, 1, true)]
        {
            let name = |n| format!("Conv{n}d k {k} g {groups} p {padding} s {stride} d {dilation}");
            let bias_len = bias.then_some(6);
            let one = Conv1dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            check(&Case {
                name: &name(1),
                weight: &[6, 4 / groups, k],
                bias: bias_len,
                input: rnd(3, &[2, 4, 7], DType::F64)?,
                cfg: CFG,
                make: &|cfg, vb| match bias {
                    true => lora::conv1d(4, 6, k, one, cfg, vb),
                    false => lora::conv1d_no_bias(4, 6, k, one, cfg, vb),
                },
                plain: &|layer, x| {
                    let l = layer.into_merged()?;
                    widened(l.weight().clone(), l.bias(), x, |w, b, x| {
                        candle_nn::Conv1d::new(w, b, one).forward(x)
                    })
                },
            })?;
            let two = Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            check(&Case {
                name: &name(2),
                weight: &[6, 4 / groups, k, k],
                bias: bias_len,
                input: rnd(3, &[2, 4, 7, 6], DType::F64)?,
                cfg: CFG,
                make: &|cfg, vb| match bias {
                    true => lora::conv2d(4, 6, k, two, cfg, vb),
                    false => lora::conv2d_no_bias(4, 6, k, two, cfg, vb),
                },
                plain: &|layer, x| {
                    let l = layer.into_merged()?;
                    widened(l.weight().clone(), l.bias(), x, |w, b, x| {
                        candle_nn::Conv2d::new(w, b, two).forward(x)
                    })
                },
            })?;
            let three = Conv3dConfig { padding, stride, dilation, groups };
            check(&Case {
                name: &name(3),
                weight: &[6, 4 / groups, k, k, k],
                bias: bias_len,
                input: rnd(3, &[2, 4, 5, 6, 4], DType::F64)?,
                cfg: CFG,
                make: &|cfg, vb| match bias {
                    true => lora::conv3d(4, 6, k, three, cfg, vb),
                    false => lora::conv3d_no_bias(4, 6, k, three, cfg, vb),
                },
                plain: &|layer, x| layer.into_merged()?.forward(x),
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_half_adapter_and_rank_stabilised_scaling() -> Result<()> {
    let vb = VarBuilder::zeros(DType::F32, &device());
    let cfg = LoraConfig { r: 4, lora_dtype: Some(DType::BF16), rslora: true, ..CFG };
    let layer = lora::linear(6, 5, cfg, vb)?;
    assert_eq!(layer.scaling(), 1.5);
    assert_eq!(layer.lora_a().map(Tensor::dtype), Some(DType::BF16));
    assert_eq!(layer.forward(&rnd(1, &[2, 6], DType::F32)?)?.dtype(), DType::F32);
    Ok(())
}

#[test]
fn options_that_do_not_fit_are_errors_with_their_values() -> Result<()> {
    let vb = || VarBuilder::zeros(DType::F32, &device());
    let says = |result: Result<()>, words: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
    };
    let linear = |cfg| lora::linear(6, 5, cfg, vb()).map(drop);
    says(linear(LoraConfig { lora_dropout: 1., ..CFG }), "lora_dropout is 1");
    says(linear(LoraConfig { lora_dropout: f32::NAN, ..CFG }), "lora_dropout is NaN");
    says(linear(LoraConfig { lora_alpha: f64::INFINITY, ..CFG }), "lora_alpha is inf");
    says(linear(LoraConfig { lora_dtype: Some(DType::U8), ..CFG }), "U8");
    let dropout = LoraConfig { lora_dropout: 0.1, ..CFG };
    says(lora::embedding(4, 3, dropout, vb()).map(drop), "lora_dropout");
    let transposed = LoraConfig { fan_in_fan_out: true, ..CFG };
    says(lora::embedding(4, 3, transposed, vb()).map(drop), "fan_in_fan_out");
    let conv = |conv_cfg, cfg| lora::conv2d(4, 6, 3, conv_cfg, cfg, vb()).map(drop);
    let ok = Conv2dConfig::default();
    says(conv(ok, transposed), "fan_in_fan_out");
    says(conv(Conv2dConfig { groups: 3, ..ok }, CFG), "3 groups");
    says(conv(Conv2dConfig { groups: 0, ..ok }, CFG), "0 groups");
    says(conv(Conv2dConfig { stride: 0, ..ok }, CFG), "stride: 0");
    says(lora::conv1d(4, 6, 0, Default::default(), CFG, vb()).map(drop), "conv1d");
    says(lora::merged_linear(4, 9, &[true, false], CFG, vb()).map(drop), "out_features = 9");
    says(lora::merged_linear(4, 9, &[], CFG, vb()).map(drop), "out_features = 9");
    let base = candle_nn::linear(4, 9, vb())?;
    let splits = [(4, true), (4, false)];
    says(lora::MergedLinear::with_splits(base, &splits, CFG, vb()).map(drop), "(4, false)");

    let layer = lora::linear(6, 5, CFG, vb())?;
    says(layer.forward(&rnd(1, &[2, 5], DType::F32)?).map(drop), "in_features = 6");
    says(layer.forward(&rnd(1, &[], DType::F32)?).map(drop), "in_features = 6");
    says(layer.forward(&rnd(1, &[2, 6], DType::F64)?).map(drop), "F64");
    let table = lora::embedding(4, 3, CFG, vb())?;
    // On a GPU an id out of range is found by the kernel, and ends the program's use of the device.
    if device().is_cpu() {
        says(table.forward(&Tensor::new(&[4u32], &device())?).map(drop), "table of 4 rows");
        says(table.forward(&Tensor::new(&[255u8], &device())?).map(drop), "table of 4 rows");
        says(table.forward(&Tensor::new(&[u32::MAX], &device())?).map(drop), "table of 4 rows");
        says(table.forward(&Tensor::new(&[-1i32], &device())?).map(drop), "table of 4 rows");
    }
    says(table.forward(&Tensor::new(&[1f32], &device())?).map(drop), "F32");
    says(linear(LoraConfig { r: usize::MAX, ..CFG }), "18446744073709551615");
    says(lora::linear(0, 5, CFG, vb()).map(drop), "in_features = 0");
    says(lora::conv2d(4, 6, 1 << 33, ok, CFG, vb()).map(drop), "8589934592");
    says(lora::conv1d(3, 0, 3, Default::default(), CFG, vb()).map(drop), "[0, 3, 3]");
    let splits = [(usize::MAX, true), (10, true)];
    let base = candle_nn::linear(4, 9, vb())?;
    says(lora::MergedLinear::with_splits(base, &splits, CFG, vb()).map(drop), "(10, true)");
    let wide = Conv1dConfig { padding: usize::MAX, ..Default::default() };
    let wide = lora::conv1d(3, 4, 3, wide, CFG, vb())?;
    says(wide.forward(&rnd(1, &[1, 3, 5], DType::F32)?).map(drop), "too large");
    let conv = lora::conv2d(4, 6, 3, ok, CFG, vb())?;
    says(conv.forward(&rnd(1, &[1, 3, 5, 5], DType::F32)?).map(drop), "[1, 3, 5, 5]");
    says(conv.forward(&rnd(1, &[1, 4, 5], DType::F32)?).map(drop), "[1, 4, 5]");
    says(conv.forward(&rnd(1, &[1, 4, 5, 2], DType::F32)?).map(drop), "has 2");
    Ok(())
}

#[test]
fn inputs_without_values_give_outputs_without_values() -> Result<()> {
    let vb = || VarBuilder::zeros(DType::F32, &device());
    let y =
        lora::linear(6, 5, CFG, vb())?.forward(&Tensor::zeros((0, 6), DType::F32, &device())?)?;
    assert_eq!(y.dims(), [0, 5]);
    let conv_cfg = Conv1dConfig { padding: 2, ..Default::default() };
    let dropping = LoraConfig { lora_dropout: 0.5, ..CFG };
    let conv = lora::conv1d(3, 4, 3, conv_cfg, dropping, vb())?;
    let y = conv.forward(&Tensor::zeros((0, 3, 5), DType::F32, &device())?)?;
    assert_eq!(y.dims(), [0, 4, 7]);
    let y = conv.forward(&Tensor::zeros((2, 3, 0), DType::F32, &device())?)?;
    assert_eq!(y.dims(), [2, 4, 2]);
    let ids = Tensor::zeros((2, 0), DType::U32, &device())?;
    assert_eq!(lora::embedding(5, 3, CFG, vb())?.forward(&ids)?.dims(), [2, 0, 3]);
    Ok(())
}

/// A Linear's output by the formula, on views with offsets and strides.
#[test]
fn every_rank_and_width_adds_the_same_update() -> Result<()> {
    for (r, n) in [(1, 3), (3, 700), (4, 64), (7, 300), (16, 513), (32, 40), (33, 700), (64, 65)] {
        let x = rnd(1, &[9, 20, 5], DType::F64)?.transpose(1, 2)?.narrow(0, 1, 7)?;
        // Also of a row with a gap behind it.
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
fn a_merged_layer_does_not_follow_later_changes_of_its_variables() -> Result<()> {
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
    assert!(
        difference(&plain.forward(&x)?, &before)? < 1e-6,
        "another product: apart by roundings"
    );
    layer.eval()?;
    assert!(difference(&layer.forward(&x)?, &before)? > 1e-2);
    Ok(())
}
