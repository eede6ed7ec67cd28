//! Options and inputs that do not fit are errors, with the value that does not fit.

use crate::common::{device, rnd, CFG};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};
use lora::LoraConfig;
use loralib as lora;

fn vb() -> VarBuilder<'static> {
    VarBuilder::zeros(DType::F32, &device())
}

fn says<T>(result: Result<T>, words: &str) {
    let error = result.err().expect(words).to_string();
    assert!(error.contains(words), "{error:?} does not contain {words:?}");
}

#[test]
fn options_out_of_range_are_refused() {
    let linear = |cfg| lora::linear(6, 5, cfg, vb());
    says(linear(LoraConfig { lora_dropout: 1., ..CFG }), "lora_dropout is 1");
    says(linear(LoraConfig { lora_dropout: f32::NAN, ..CFG }), "lora_dropout is NaN");
    says(linear(LoraConfig { lora_alpha: f64::INFINITY, ..CFG }), "lora_alpha is inf");
    says(linear(LoraConfig { lora_dtype: Some(DType::U8), ..CFG }), "U8");
    says(linear(LoraConfig { r: usize::MAX, ..CFG }), "18446744073709551615");
    says(lora::linear(0, 5, CFG, vb()), "in_features = 0");
}

#[test]
fn options_that_a_layer_lacks_are_refused() {
    let dropout = LoraConfig { lora_dropout: 0.1, ..CFG };
    let transposed = LoraConfig { fan_in_fan_out: true, ..CFG };
    says(lora::embedding(4, 3, dropout, vb()), "lora_dropout");
    says(lora::embedding(4, 3, transposed, vb()), "fan_in_fan_out");
    let conv = Conv2dConfig::default();
    says(lora::conv2d(4, 6, 3, conv, transposed, vb()), "fan_in_fan_out");
}

#[test]
fn splits_that_do_not_sum_up_are_refused() -> Result<()> {
    says(lora::merged_linear(4, 9, &[true, false], CFG, vb()), "out_features = 9");
    says(lora::merged_linear(4, 9, &[], CFG, vb()), "out_features = 9");
    for (splits, words) in
        [([(4, true), (4, false)], "(4, false)"), ([(usize::MAX, true), (10, true)], "(10, true)")]
    {
        let base = candle_nn::linear(4, 9, vb())?;
        says(lora::MergedLinear::with_splits(base, &splits, CFG, vb()), words);
    }
    Ok(())
}

#[test]
fn geometries_that_do_not_fit_are_refused() -> Result<()> {
    let ok = Conv2dConfig::default();
    let conv = |conv_cfg| lora::conv2d(4, 6, 3, conv_cfg, CFG, vb());
    says(conv(Conv2dConfig { groups: 3, ..ok }), "3 groups");
    says(conv(Conv2dConfig { groups: 0, ..ok }), "0 groups");
    says(conv(Conv2dConfig { stride: 0, ..ok }), "stride: 0");
    says(conv(Conv2dConfig { dilation: 0, ..ok }), "dilation: 0");
    says(lora::conv1d(4, 6, 0, Default::default(), CFG, vb()), "conv1d");
    says(lora::conv2d(4, 6, 1 << 33, ok, CFG, vb()), "8589934592");
    says(lora::conv1d(3, 0, 3, Default::default(), CFG, vb()), "[0, 3, 3]");
    let large = Conv1dConfig { padding: usize::MAX, ..Default::default() };
    let large = lora::conv1d(3, 4, 3, large, CFG, vb())?;
    says(large.forward(&rnd(1, &[1, 3, 5], DType::F32)?), "too large");
    Ok(())
}

#[test]
fn inputs_of_other_shapes_and_dtypes_are_refused() -> Result<()> {
    let layer = lora::linear(6, 5, CFG, vb())?;
    says(layer.forward(&rnd(1, &[2, 5], DType::F32)?), "in_features = 6");
    says(layer.forward(&rnd(1, &[], DType::F32)?), "in_features = 6");
    says(layer.forward(&rnd(1, &[2, 6], DType::F64)?), "F64");
    let conv = lora::conv2d(4, 6, 3, Default::default(), CFG, vb())?;
    says(conv.forward(&rnd(1, &[1, 3, 5, 5], DType::F32)?), "[1, 3, 5, 5]");
    says(conv.forward(&rnd(1, &[1, 4, 5], DType::F32)?), "[1, 4, 5]");
    says(conv.forward(&rnd(1, &[1, 4, 5, 2], DType::F32)?), "has 2");
    Ok(())
}

#[test]
fn ids_outside_the_table_are_refused() -> Result<()> {
    let table = lora::embedding(4, 3, CFG, vb())?;
    says(table.forward(&Tensor::new(&[1f32], &device())?), "F32");
    // On a GPU the kernel finds an id out of range, after which the device cannot be used.
    if device().is_cpu() {
        let cpu = &Device::Cpu;
        says(table.forward(&Tensor::new(&[4u32], cpu)?), "table of 4 rows");
        says(table.forward(&Tensor::new(&[255u8], cpu)?), "table of 4 rows");
        says(table.forward(&Tensor::new(&[u32::MAX], cpu)?), "table of 4 rows");
        says(table.forward(&Tensor::new(&[-1i32], cpu)?), "table of 4 rows");
    }
    Ok(())
}
