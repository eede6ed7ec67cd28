//! Adapters on convolutions and quantised weights.

use super::cfg;
use crate::common::{bits, difference, randn};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use loralib::nn::{self, conv1d, conv2d, linear_no_bias, Conv1dConfig, Conv2dConfig};
use loralib::{gguf, Adapter, Adapters, LoraConfig, Result};
use nn::{VarBuilder, VarMap};
use std::collections::HashMap;
use std::sync::Arc;

/// A set with the adapters "a" and "b" on all layers that `build` makes, and for each a model of its own.
fn check<M: Sync>(
    base: &VarBuilder,
    build: impl Fn(VarBuilder) -> candle_core::Result<M>,
    forward: impl Fn(&M, &Tensor) -> candle_core::Result<Tensor> + Sync,
    x: &Tensor,
) -> Result<()> {
    let plain = forward(&build(base.clone())?, x)?;
    let adapters = Adapters::new();
    let model = build(adapters.var_builder(base.clone()))?;
    let mut alone = vec![];
    for (name, r) in [("a", 1), ("b", 3)] {
        let adapter = Adapter::new(cfg(r, 2.)).targets(["layer"]);
        adapters.add(name, &adapter)?;
        adapter.check()?;
        let own = build(adapter.var_builder(base.clone()))?;
        crate::adapter::randomize(&adapter)?;
        let y = adapters.with(name, || forward(&model, x))?;
        assert!(difference(&y, &forward(&own, x)?)? < 1e-6, "{name}");
        adapter.eval()?;
        alone.push(y);
    }
    assert_eq!(bits(&forward(&model, x)?)?, bits(&plain)?);
    assert!(difference(&alone[0], &plain)? > 1e-3 && difference(&alone[1], &plain)? > 1e-3);
    let rows = [Some("b"), None, Some("a")];
    let y = adapters.with_rows(&rows, || forward(&model, x))?;
    for (i, expected) in [&alone[1], &plain, &alone[0]].into_iter().enumerate() {
        assert!(difference(&y.narrow(0, i, 1)?, &expected.narrow(0, i, 1)?)? < 1e-6, "row {i}");
    }
    let sum = adapters.with([("a", 1.), ("b", 1.)], || forward(&model, x))?;
    // One layer alone is linear in its update.
    let expected = ((&alone[0] + &alone[1])? - &plain)?;
    assert!(difference(&sum, &expected)? < 1e-5);
    adapters.add("sum", &adapters.sum([("a", 1.), ("b", 1.)])?)?;
    assert!(difference(&adapters.with("sum", || forward(&model, x))?, &sum)? < 1e-6);
    Ok(())
}

/// The base of one convolution.
fn convolution() -> Result<VarBuilder<'static>> {
    let weight = randn((6, 4, 3, 3), DType::F32, &Device::Cpu)?;
    let tensors = [("layer.weight", weight), ("layer.bias", randn(6, DType::F32, &Device::Cpu)?)];
    let tensors = tensors.map(|(name, t)| (name.to_owned(), t)).into();
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// A random adapter of it, with factors as PEFT's or as loralib's.
fn of_convolution(r: usize, conv_kernels: bool, base: &VarBuilder) -> Result<Adapter> {
    let adapter = Adapter::new(LoraConfig { conv_kernels, ..cfg(r, 2.) }).targets(["layer"]);
    conv2d(4, 6, 3, Default::default(), adapter.var_builder(base.clone()).pp("layer"))?;
    crate::adapter::randomize(&adapter)?;
    adapter.eval()?;
    Ok(adapter)
}

/// Also of adapters that were saved and loaded.
#[test]
fn a_sum_of_kernels_as_peft_s_has_the_sum_of_their_ranks() -> Result<()> {
    let (base, adapters) = (convolution()?, Adapters::new());
    let model =
        conv2d(4, 6, 3, Default::default(), adapters.var_builder(base.clone()).pp("layer"))?;
    let x = randn((1, 4, 7, 6), DType::F32, &Device::Cpu)?;
    for (name, r) in [("a", 1), ("b", 3)] {
        let dir = tempfile::tempdir()?;
        of_convolution(r, true, &base)?.save_pretrained(dir.path())?;
        adapters.add(name, &Adapter::load(dir.path(), &Device::Cpu)?)?;
    }
    let strengths = [("a", 0.5), ("b", -2.)];
    let y = adapters.with(strengths, || model.forward(&x))?;
    let (dir, sum) = (tempfile::tempdir()?, adapters.sum(strengths)?);
    sum.save_pretrained(dir.path())?;
    let file = dir.path().join("adapter_model.safetensors");
    let saved = candle_core::safetensors::load(file, &Device::Cpu)?;
    assert_eq!(saved["base_model.model.layer.lora_A.weight"].dims(), [4, 4, 3, 3]);
    for (name, adapter) in [("sum", sum), ("saved", Adapter::load(dir.path(), &Device::Cpu)?)] {
        adapters.add(name, &adapter)?;
        let sum = adapters.with(name, || model.forward(&x))?;
        assert!(difference(&sum, &y)? < 1e-5, "{name}");
    }
    Ok(())
}

#[test]
fn a_sum_of_kernels_as_peft_s_and_as_loralib_s_names_the_way_out() -> Result<()> {
    let (base, adapters) = (convolution()?, Adapters::new());
    let model =
        conv2d(4, 6, 3, Default::default(), adapters.var_builder(base.clone()).pp("layer"))?;
    let x = randn((1, 4, 7, 6), DType::F32, &Device::Cpu)?;
    adapters.add("peft", &of_convolution(2, true, &base)?)?;
    adapters.add("loralib", &of_convolution(2, false, &base)?)?;
    let strengths = [("peft", 1.), ("loralib", 1.)];
    let computed = adapters.with(strengths, || model.forward(&x)).map_err(Into::into);
    for error in [computed.err(), adapters.sum(strengths).err()] {
        let error: loralib::Error = error.unwrap();
        assert!(error.to_string().contains("merge::add_weighted"), "{error}");
    }
    Ok(())
}

fn random() -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu)
}

#[test]
fn convolutions_have_several_adapters() -> Result<()> {
    let two = Conv2dConfig { padding: 1, stride: 2, groups: 2, ..Default::default() };
    let x = randn((3, 4, 7, 6), DType::F32, &Device::Cpu)?;
    check(&random(), |vb| conv2d(4, 6, 3, two, vb.pp("layer")), |m, x| m.forward(x), &x)?;
    let one = Conv1dConfig { dilation: 3, ..Default::default() };
    let x = randn((3, 4, 12), DType::F32, &Device::Cpu)?;
    check(&random(), |vb| conv1d(4, 5, 3, one, vb.pp("layer")), |m, x| m.forward(x), &x)
}

#[test]
fn a_quantised_base_has_several_adapters() -> Result<()> {
    let weight = randn((16, 64), DType::F32, &Device::Cpu)?;
    let blocks = Arc::new(QTensor::quantize(&weight, GgmlDType::Q4_0)?);
    let tensors = HashMap::from([("layer.weight".to_owned(), blocks)]);
    let base = gguf::var_builder(tensors, DType::F32, &Device::Cpu);
    let x = randn((3, 2, 64), DType::F32, &Device::Cpu)?;
    check(&base, |vb| linear_no_bias(64, 16, vb.pp("layer")), |m, x| m.forward(x), &x)
}
