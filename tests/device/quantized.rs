//! A layer over a quantised weight computes as one over the dequantised weight.

use crate::common::{bits, device, difference, rnd, values, CFG};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use loralib::layers::Adapted;
use loralib::{self as lora, LoraConfig, LoraModule, Mode};
use std::sync::Arc;

/// All that candle quantises to and decodes on every device.
const FORMATS: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

const IN: usize = 512;
const OUT: usize = 96;

fn quantize(seed: u64, shape: &[usize], dtype: GgmlDType) -> Result<Arc<QTensor>> {
    Ok(Arc::new(QTensor::quantize_onto(
        &rnd(seed, shape, DType::F32)?.to_device(&candle_core::Device::Cpu)?,
        dtype,
        &device(),
    )?))
}

/// The same factors, none of them zero, for two layers.
fn factors(a: &[usize], b: &[usize], dtype: DType) -> Result<VarBuilder<'static>> {
    let vars = VarMap::new();
    for (name, seed, shape) in [("lora_A", 3, a), ("lora_B", 4, b)] {
        let var = Var::from_tensor(&rnd(seed, shape, dtype)?)?;
        vars.data().lock().unwrap().insert(name.into(), var);
    }
    Ok(VarBuilder::from_varmap(&vars, dtype, &device()))
}

/// Output and gradients of x, A, B and the magnitude for one upstream gradient.
fn outputs<K>(layer: &Adapted<K>, x: &Var) -> Result<Vec<Tensor>>
where
    Adapted<K>: Module,
{
    let y = layer.forward(x)?;
    let grads = (&y * rnd(9, y.dims(), y.dtype())?)?.sum_all()?.backward()?;
    let mut all = vec![y];
    let variables = [layer.lora_a(), layer.lora_b(), layer.lora_magnitude_vector()];
    for t in [Some(x.as_tensor())].into_iter().chain(variables).flatten() {
        all.push(grads.get(t).expect("a gradient").clone());
    }
    Ok(all)
}

fn assert_close(a: &[Tensor], b: &[Tensor], tolerance: f64, what: &str) -> Result<()> {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let apart = difference(a, b)?;
        assert!(apart <= tolerance, "{what}: {apart} apart in tensor {i}");
    }
    Ok(())
}

#[test]
fn every_format_computes_as_its_dequantised_weight() -> Result<()> {
    for format in FORMATS {
        let w = quantize(1, &[OUT, IN], format)?;
        let dense = w.dequantize(&device())?;
        let bias = rnd(2, &[OUT], DType::F32)?;
        let vb = factors(&[2, IN], &[OUT, 2], DType::F32)?;
        let quantized = lora::Linear::quantized(w, Some(bias.clone()), CFG, vb.clone())?;
        let expected = lora::Linear::new(candle_nn::Linear::new(dense, Some(bias)), CFG, vb)?;
        for m in [1, 7, 32, 256, 1024] {
            let x = Var::from_tensor(&rnd(5, &[m, IN], DType::F32)?)?;
            let (y, expected) = (outputs(&quantized, &x)?, outputs(&expected, &x)?);
            assert_close(&y, &expected, 1e-6, &format!("{format:?}, {m} rows"))?;
        }
    }
    Ok(())
}

#[test]
fn a_layer_without_an_update_has_the_input_s_gradient() -> Result<()> {
    let w = quantize(1, &[OUT, IN], GgmlDType::Q4_0)?;
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &device());
    let dense = candle_nn::Linear::new(w.dequantize(&device())?, None);
    let quantized = lora::Linear::quantized(w, None, LoraConfig::default(), vb.clone())?;
    let expected = lora::Linear::new(dense, LoraConfig::default(), vb)?;
    let x = Var::from_tensor(&rnd(5, &[2, 3, IN], DType::F32)?)?;
    assert_close(&outputs(&quantized, &x)?, &outputs(&expected, &x)?, 1e-6, "r = 0")
}

#[test]
fn splits_dropout_and_a_transposed_weight_compute_as_over_a_dense_one() -> Result<()> {
    let x = Var::from_tensor(&rnd(5, &[7, IN], DType::F32)?)?;
    let w = quantize(1, &[OUT, IN], GgmlDType::Q8_0)?;
    let dense = candle_nn::Linear::new(w.dequantize(&device())?, None);
    let splits = [(64, true), (16, false), (16, true)];
    let vb = factors(&[4, IN], &[80, 2], DType::F32)?;
    let quantized = lora::MergedLinear::quantized(w, None, &splits, CFG, vb.clone())?;
    let expected = lora::MergedLinear::with_splits(dense, &splits, CFG, vb)?;
    assert_close(&outputs(&quantized, &x)?, &outputs(&expected, &x)?, 1e-6, "splits")?;

    let cfg = LoraConfig { fan_in_fan_out: true, ..CFG };
    let w = quantize(1, &[IN, OUT], GgmlDType::Q8_0)?;
    let dense = candle_nn::Linear::new(w.dequantize(&device())?, None);
    let vb = factors(&[2, IN], &[OUT, 2], DType::F32)?;
    let quantized = lora::Linear::quantized(w, None, cfg, vb.clone())?;
    let expected = lora::Linear::new(dense, cfg, vb)?;
    assert_close(&outputs(&quantized, &x)?, &outputs(&expected, &x)?, 1e-6, "transposed")
}

#[test]
fn dora_computes_as_over_a_dense_weight() -> Result<()> {
    let cfg = LoraConfig { use_dora: true, ..CFG };
    let x = Var::from_tensor(&rnd(5, &[7, IN], DType::F32)?)?;
    let w = quantize(1, &[OUT, IN], GgmlDType::Q8_0)?;
    let dense = candle_nn::Linear::new(w.dequantize(&device())?, None);
    let vb = || {
        let vars = VarMap::new();
        for (name, seed, shape) in [
            ("lora_A", 3, &[2, IN][..]),
            ("lora_B", 4, &[OUT, 2]),
            ("lora_magnitude_vector", 5, &[OUT]),
        ] {
            let var = Var::from_tensor(&rnd(seed, shape, DType::F32)?)?;
            vars.data().lock().unwrap().insert(name.into(), var);
        }
        Ok::<_, candle_core::Error>(VarBuilder::from_varmap(&vars, DType::F32, &device()))
    };
    let mut quantized = lora::Linear::quantized(w, None, cfg, vb()?)?;
    let expected = lora::Linear::new(dense, cfg, vb()?)?;
    let (ours, theirs) = (outputs(&quantized, &x)?, outputs(&expected, &x)?);
    assert_eq!(ours.len(), 5);
    assert_close(&ours, &theirs, 1e-5, "DoRA")?;
    quantized.eval()?;
    let evaluated = quantized.forward(&x.detach())?;
    assert!(!evaluated.track_op());
    assert_close(&[evaluated], &theirs[..1], 1e-5, "DoRA in evaluation")
}

/// The weight is decoded to F32 on the CPU and to the model's dtype on devices.
#[test]
fn half_precision_models_compute_beside_quantised_weights() -> Result<()> {
    for (dtype, tolerance) in [(DType::BF16, 3e-2), (DType::F16, 4e-3)] {
        let w = quantize(1, &[OUT, IN], GgmlDType::Q4K)?;
        let exact = w.dequantize(&device())?;
        let vb = factors(&[2, IN], &[OUT, 2], DType::F32)?;
        let expected = lora::Linear::new(candle_nn::Linear::new(exact, None), CFG, vb.clone())?;
        let layer = lora::Linear::quantized(w, None, CFG, vb.set_dtype(dtype))?;
        let x = rnd(5, &[9, IN], dtype)?;
        let exact = Var::from_tensor(&x.to_dtype(DType::F32)?)?;
        let (y, expected) = (outputs(&layer, &Var::from_tensor(&x)?)?, outputs(&expected, &exact)?);
        assert!(y[0].dtype() == dtype && y[2].dtype() == DType::F32);
        assert_close(&y, &expected, tolerance, &format!("{dtype:?}"))?;
    }
    Ok(())
}

#[test]
fn an_embedding_decodes_the_rows_of_its_ids() -> Result<()> {
    let w = quantize(1, &[40, 64], GgmlDType::Q8_0)?;
    let dense = candle_nn::Embedding::new(w.dequantize(&device())?, 64);
    let ids = Tensor::new(&[[3u32, 39, 0], [3, 7, 1]], &device())?;
    let plain = LoraConfig::default();
    let vb = || factors(&[2, 40], &[64, 2], DType::F32);
    let layer = lora::Embedding::quantized(w.clone(), plain, vb()?)?;
    assert_eq!(bits(&layer.forward(&ids)?)?, bits(&dense.forward(&ids)?)?);
    let outside = Tensor::new(&[40i64], &candle_core::Device::Cpu)?;
    if device().is_cpu() {
        assert!(layer
            .forward(&outside)
            .unwrap_err()
            .to_string()
            .contains("id 40 in a table of 40"));
    }

    let vb = vb()?;
    let layer = lora::Embedding::quantized(w, CFG, vb.clone())?;
    let expected = lora::Embedding::new(dense, CFG, vb)?;
    let gradients = |layer: &lora::Embedding| -> Result<Vec<Tensor>> {
        let y = layer.forward(&ids)?;
        let grads = (&y * rnd(9, y.dims(), y.dtype())?)?.sum_all()?.backward()?;
        let of = |t: Option<&Tensor>| grads.get(t.unwrap()).unwrap().clone();
        Ok(vec![y, of(layer.lora_a()), of(layer.lora_b())])
    };
    assert_close(&gradients(&layer)?, &gradients(&expected)?, 1e-6, "embedding")
}

#[test]
fn a_tied_head_takes_the_table_s_blocks() -> Result<()> {
    let w = quantize(1, &[40, 64], GgmlDType::Q8_0)?;
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &device());
    let table = lora::Embedding::quantized(w.clone(), LoraConfig::default(), vb.clone())?;
    let head = candle_nn::Linear::new(table.weight().clone(), None);
    let head = lora::Linear::new(head, LoraConfig::default(), vb)?;
    assert!(Arc::ptr_eq(head.quantized_weight().unwrap(), &w));
    let x = rnd(5, &[3, 64], DType::F32)?;
    let expected = x.matmul(&w.dequantize(&device())?.t()?)?;
    assert!(difference(&head.forward(&x)?, &expected)? < 1e-6);
    Ok(())
}

#[test]
fn evaluation_keeps_the_blocks_and_merges_on_demand() -> Result<()> {
    let w = quantize(1, &[OUT, IN], GgmlDType::Q4_0)?;
    let dense = candle_nn::Linear::new(w.dequantize(&device())?, None);
    let vb = factors(&[2, IN], &[OUT, 2], DType::F32)?;
    let mut layer = lora::Linear::quantized(w, None, CFG, vb.clone())?;
    let expected = lora::Linear::new(dense, CFG, vb)?.merged_weight()?;
    let x = rnd(5, &[3, IN], DType::F32)?;
    let trained = layer.forward(&x)?;
    layer.set_mode(Mode::Eval)?;
    assert!(!layer.is_merged());
    let y = layer.forward(&x)?;
    assert!(!y.track_op());
    assert_eq!(bits(&y)?, bits(&trained)?);
    assert_eq!(bits(&layer.merged_weight()?)?, bits(&expected)?);
    let merged = layer.into_merged()?;
    assert!(difference(&merged.forward(&x)?, &y)? < 1e-5);
    Ok(())
}

#[test]
fn what_is_no_matrix_is_refused() -> Result<()> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &device());
    for shape in [vec![32], vec![2, 3, 32]] {
        let w = quantize(1, &shape, GgmlDType::Q4_0)?;
        assert!(lora::Linear::quantized(w.clone(), None, CFG, vb.clone()).is_err());
        assert!(lora::Embedding::quantized(w, CFG, vb.clone()).is_err());
    }
    Ok(())
}

/// One row has a kernel of its own, which rounds nothing.
#[test]
fn one_row_is_multiplied_as_it_is_beside_others_in_every_format() -> Result<()> {
    for format in FORMATS {
        let w = quantize(1, &[OUT, IN], format)?;
        let vb = factors(&[2, IN], &[OUT, 2], DType::F32)?;
        let mut layer = lora::Linear::quantized(w, None, CFG, vb)?;
        let x = rnd(5, &[1, 9, IN], DType::F32)?;
        for mode in [Mode::Train, Mode::Eval] {
            layer.set_mode(mode)?;
            let all = layer.forward(&x)?;
            for rows in [1, 3] {
                let few = layer.forward(&x.narrow(1, 2, rows)?.contiguous()?)?;
                let apart = difference(&few, &all.narrow(1, 2, rows)?)?;
                assert!(apart < 1e-6, "{format:?}, {rows} rows: {apart}");
            }
        }
    }
    Ok(())
}

/// Infinities give what they give over the dequantised weight, whatever the number of rows.
#[test]
fn infinite_inputs_are_not_lost_in_a_row_s_sums() -> Result<()> {
    let none = LoraConfig { r: 0, ..CFG };
    for format in FORMATS {
        let w = quantize(1, &[OUT, IN], format)?;
        let vb = factors(&[2, IN], &[OUT, 2], DType::F32)?;
        let layer = lora::Linear::quantized(w, None, none, vb)?;
        for value in [f64::INFINITY, f64::NAN] {
            let mut x = vec![1f32; 9 * IN];
            x.chunks_mut(IN).for_each(|x| (x[3], x[40]) = (value as f32, value as f32));
            let x = Tensor::from_vec(x, (9, IN), &device())?;
            let all = values(&layer.forward(&x)?)?;
            let one = values(&layer.forward(&x.narrow(0, 0, 1)?)?)?;
            let same =
                |a: &f64, b: &f64| a == b || a.is_nan() && b.is_nan() || (a / b - 1.).abs() < 1e-5;
            assert!(all.iter().zip(&one).all(|(a, b)| same(a, b)), "{format:?} of {value}");
        }
    }
    Ok(())
}

#[test]
fn a_placeholder_whose_blocks_are_gone_is_an_error() -> Result<()> {
    let weight = {
        let w = quantize(1, &[OUT, IN], GgmlDType::Q4_0)?;
        let tensors = std::collections::HashMap::from([("weight".to_owned(), w)]);
        lora::gguf::var_builder(tensors, DType::F32, &device()).get((OUT, IN), "weight")?
    };
    let layer = lora::nn::Linear::new(weight, None);
    let error = layer.forward(&rnd(5, &[3, IN], DType::F32)?).unwrap_err().to_string();
    assert!(error.contains("`VarBuilder` was dropped"), "{error}");
    Ok(())
}
