//! Convolutions of several groups: loralib's update converts to PEFT's format, PEFT's own does not convert
//! back.

use crate::common::{bits, difference, rnd, CFG};
use crate::{folder, model, CPU};
use candle_core::{DType, Module, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder};
use lora::adapter::AdapterConfig;
use lora::formats::peft;
use lora::layers::LayerKind;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::LoraWeights;
use loralib as lora;
use std::collections::HashMap;

fn kind(n: usize, groups: usize) -> LayerKind {
    match n {
        1 => LayerKind::Conv1d { groups },
        2 => LayerKind::Conv2d { groups },
        _ => LayerKind::Conv3d { groups },
    }
}

/// A kernel (out, in/groups, k..) as (out, in, k..): zero for the inputs of other groups.
fn dense(kernel: &Tensor, groups: usize) -> lora::Result<Tensor> {
    let (outs, inputs) = (kernel.dim(0)? / groups, kernel.dim(1)?);
    let part = |j| {
        kernel.narrow(0, j * outs, outs)?.pad_with_zeros(1, j * inputs, (groups - 1 - j) * inputs)
    };
    let parts: candle_core::Result<Vec<_>> = (0..groups).map(part).collect();
    Ok(Tensor::cat(&parts?, 0)?)
}

/// PEFT's update of (out, in, k..) by its formula: B has groups of ranks and outputs, A has all inputs.
fn delta(a: &Tensor, b: &Tensor, groups: usize, scaling: f64) -> lora::Result<Tensor> {
    let (a, b) = (a.flatten_from(1)?, b.flatten_from(1)?);
    let (outs, own) = (b.dim(0)? / groups, b.dim(1)?);
    let part = |j| b.narrow(0, j * outs, outs)?.matmul(&a.narrow(0, j * own, own)?);
    let parts: candle_core::Result<Vec<_>> = (0..groups).map(part).collect();
    Ok((Tensor::cat(&parts?, 0)? * scaling)?)
}

#[test]
fn grouped_convolutions_round_trip() -> lora::Result<()> {
    for (n, groups, k) in (1..=3usize).flat_map(|n| [(n, 2, 3), (n, 3, 3), (n, 4, 2), (n, 6, 1)]) {
        let (inputs, out) = (12, 24);
        let (u, width) = (usize::pow(k, n as u32 / 2), usize::pow(k, n.div_ceil(2) as u32));
        let weight = [&[out, inputs / groups][..], &[k; 3][..n]].concat();
        let adapter = StateDict::from([
            ("c.lora_A".into(), rnd(1, &[2 * k, inputs * width], DType::F64)?.to_device(&CPU)?),
            ("c.lora_B".into(), rnd(2, &[out / groups * u, 2 * k], DType::F64)?.to_device(&CPU)?),
        ]);
        let base = StateDict::from([("c.weight".into(), Tensor::zeros(weight, DType::F64, &CPU)?)]);
        let config = AdapterConfig::from(CFG).with_layer("c", kind(n, groups));
        let dir = tempfile::tempdir()?;
        let weights = LoraWeights::new(config, adapter.clone())?;
        peft::save(dir.path(), &weights)?;

        let file = dir.path().join("adapter_model.safetensors");
        let file = lora::read_state_dict(file, &CPU)?.tensors;
        let factor = |last| &file[&format!("base_model.model.c.{last}.weight")];
        let merged = merge_into(&base, &weights)?;
        let expected = dense(&merged["c.weight"], groups)?.flatten_from(1)?;
        let theirs = delta(factor("lora_A"), factor("lora_B"), groups, CFG.scaling())?;
        assert!(difference(&theirs, &expected)? < 1e-14, "{n} {groups} {k}");

        let weights = peft::load(dir.path(), &CPU)?;
        let (loaded, tensors) = (weights.config(), weights.state_dict());
        assert_eq!(loaded.kind("c"), Some(&kind(n, groups)));
        assert_eq!(loaded.lora_config("c").scaling(), CFG.scaling());
        assert!(tensors.keys().eq(adapter.keys()));
        for (name, tensor) in &tensors {
            assert_eq!(tensor.dims(), adapter[name].dims(), "{name}");
            assert_eq!(bits(tensor)?, bits(&adapter[name])?, "{name}");
        }
        let other = AdapterConfig::from(CFG).with_layer("c", kind(n, 1));
        let other = LoraWeights::new(other, adapter)?;
        let error = merge_into(&base, &other).unwrap_err().to_string();
        assert!(error.contains(&format!("with {groups} groups")), "{error}");
    }
    Ok(())
}

/// The fixture is an independent conversion, whose outputs PEFT computed.
#[test]
fn grouped_convolution_agrees_with_peft() -> lora::Result<()> {
    let all = lora::read_state_dict(folder("groups").join("model.safetensors"), &CPU)?.tensors;
    let [base, _, x, y] = model("groups")?;
    let weights = peft::load(folder("groups"), &CPU)?;
    let (config, adapter) = (weights.config(), weights.state_dict());
    for (name, tensor) in &adapter {
        assert_eq!(bits(tensor)?, bits(&all[&format!("lora.{name}")])?, "{name}");
    }
    let tensors = base.into_iter().chain(adapter).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    let options = Conv2dConfig { groups: 2, ..Default::default() };
    let layer = lora::conv2d_no_bias(4, 6, 3, options, config.lora_config("conv"), vb.pp("conv"))?;
    assert!(difference(&layer.forward(&x["conv"])?, &y["conv"])? < 2e-6);

    let dir = tempfile::tempdir()?;
    peft::save(dir.path(), &weights)?;
    let file =
        |dir: &std::path::Path| lora::read_state_dict(dir.join("adapter_model.safetensors"), &CPU);
    let (ours, theirs) = (file(dir.path())?.tensors, file(&folder("groups"))?.tensors);
    assert!(ours.keys().eq(theirs.keys()));
    for (name, tensor) in &ours {
        assert_eq!(bits(tensor)?, bits(&theirs[name])?, "{name}");
    }
    Ok(())
}

/// Here the rank alone would fit loralib's factors, but the values do not.
#[test]
fn dense_factors_of_equal_rank_keep_their_update() -> lora::Result<()> {
    let groups_of = |groups: usize| -> lora::Result<_> {
        let dir = tempfile::tempdir()?;
        let zeros = |dims: [usize; 2]| Tensor::zeros(&dims[..], DType::F32, &CPU);
        let adapter = StateDict::from([
            ("c.lora_A".into(), zeros([2 * 3, 4 * 3])?),
            ("c.lora_B".into(), zeros([6 / groups * 3, 2 * 3])?),
        ]);
        let config = AdapterConfig::from(CFG).with_layer("c", LayerKind::Conv2d { groups });
        peft::save(dir.path(), &LoraWeights::new(config, adapter)?)?;
        let file = dir.path().join("adapter_model.safetensors");
        let mut dense = HashMap::new();
        for (i, (name, t)) in lora::read_state_dict(&file, &CPU)?.tensors.into_iter().enumerate() {
            dense.insert(name, rnd(i as u64, t.dims(), DType::F32)?.to_device(&CPU)?);
        }
        candle_core::safetensors::save(&dense, &file)?;
        Ok((peft::load(dir.path(), &CPU), dense))
    };
    let (loaded, file) = groups_of(1)?;
    let base =
        StateDict::from([("c.weight".into(), Tensor::zeros((6, 4, 3, 3), DType::F32, &CPU)?)]);
    let merged = merge_into(&base, &loaded?)?["c.weight"].flatten_from(1)?;
    let factor = |last| &file[&format!("base_model.model.c.{last}.weight")];
    let theirs = delta(factor("lora_A"), factor("lora_B"), 1, CFG.scaling())?;
    assert!(difference(&merged, &theirs)? < 1e-6);
    let error = groups_of(2)?.0.unwrap_err().to_string();
    assert!(error.contains("c.lora_A") && error.contains("2 groups"), "{error}");
    Ok(())
}

#[test]
fn updates_across_groups_are_refused() -> lora::Result<()> {
    let error = peft::load(folder("groups_dense"), &CPU).unwrap_err().to_string();
    assert!(error.contains("conv.lora_A") && error.contains("2 groups"), "{error}");
    let ones = |dims: [usize; 2]| Tensor::ones(&dims[..], DType::F32, &CPU);
    let adapter = StateDict::from([
        ("c.lora_A".into(), ones([6, 512 * 3])?),
        ("c.lora_B".into(), ones([3, 6])?),
    ]);
    let config = AdapterConfig::from(CFG).with_layer("c", LayerKind::Conv2d { groups: 512 });
    let dir = tempfile::tempdir()?;
    let weights = LoraWeights::new(config, adapter)?;
    let error = peft::save(dir.path(), &weights).unwrap_err().to_string();
    assert!(error.contains("c.lora_A") && error.contains("512 groups"), "{error}");
    Ok(())
}
