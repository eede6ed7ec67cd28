//! What a format gives trains as an `Adapter`.

use crate::{fixture, model, CPU};
use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;
use lora::formats::{diffusers, kohya, mlx};
use lora::utils::StateDict;
use lora::{missing_grads, LoraWeights};
use loralib::{self as lora, nn};
use std::fs;

/// The linear layers of an adapter, in `dtype`.
fn linear(weights: &LoraWeights, base: &StateDict, dtype: DType) -> lora::Result<StateDict> {
    let is_linear = |name: &str| {
        let weight = name.rsplit_once('.').map(|(path, _)| format!("{path}.weight"));
        let weight = weight.and_then(|weight| base.get(&weight));
        weight.is_some_and(|weight| weight.rank() == 2) && !name.contains("embed_tokens")
    };
    let linear = weights.state_dict().into_iter().filter(|(name, _)| is_linear(name));
    linear.map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?))).collect()
}

/// All factors of linear layers get a gradient.
fn assert_trains(weights: &LoraWeights, base: StateDict, dtype: DType) -> lora::Result<()> {
    let tensors = linear(weights, &base, dtype)?;
    assert!(!tensors.is_empty());
    let mut config = weights.config();
    config.layers.retain(|path, _| tensors.contains_key(&format!("{path}.lora_A")));
    let adapter = lora::Adapter::from_weights(&LoraWeights::new(config, tensors.clone())?)?;
    let sizes: Vec<_> = tensors
        .keys()
        .filter_map(|name| name.strip_suffix(".lora_A"))
        .map(|path| Ok((path, base[&format!("{path}.weight")].dims2()?)))
        .collect::<lora::Result<_>>()?;
    let base = VarBuilder::from_tensors(base.into_iter().collect(), DType::F32, &CPU);
    let vb = adapter.var_builder(base);
    let mut loss = Tensor::zeros((), DType::F32, &CPU)?;
    for (path, (outs, ins)) in sizes {
        let layer = nn::linear_no_bias(ins, outs, vb.pp(path))?;
        let x = Tensor::ones((1, ins), DType::F32, &CPU)?;
        loss = (loss + layer.forward(&x)?.sqr()?.sum_all()?)?;
    }
    adapter.check()?;
    let grads = loss.backward()?;
    assert!(missing_grads(adapter.var_map(), &grads).is_empty());
    for (name, var) in adapter.named_vars()? {
        assert_eq!(var.dtype(), DType::F32, "{name}");
        assert!(grads.get(&var).unwrap().abs()?.sum_all()?.to_scalar::<f32>()? > 0., "{name}");
    }
    Ok(())
}

#[test]
fn an_adapter_of_each_format_trains_in_f32() -> lora::Result<()> {
    let names = fs::read_to_string(fixture("kohya/names.txt"))?;
    let names: Vec<_> = names.lines().collect();
    let of_unet = |base: StateDict| -> StateDict {
        let own =
            base.into_iter().filter_map(|(k, t)| Some((k.strip_prefix("unet.")?.to_owned(), t)));
        own.collect()
    };
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F8E4M3] {
        for case in ["diffusers/new", "diffusers/old", "diffusers/processor"] {
            let file = fixture(case).join("pytorch_lora_weights.safetensors");
            assert_trains(
                &diffusers::load(file, &CPU)?.component("unet")?,
                of_unet(model(case)?[0].clone()),
                dtype,
            )?;
        }
        for case in ["kohya/attention", "kohya/conv"] {
            let file = fixture(case).join("lora.safetensors");
            let weights = kohya::with_paths(&kohya::load(file, &CPU)?, &names)?;
            assert_trains(&weights.component("unet")?, of_unet(model(case)?[0].clone()), dtype)?;
        }
        assert_trains(&mlx::load(fixture("mlx"), &CPU)?, model("mlx")?[0].clone(), dtype)?;
    }
    Ok(())
}
