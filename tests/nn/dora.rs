//! An `Adapter` with DoRA: variables, files, merges, and what refuses it.

use crate::adapter::{base, ids, randomize, vb, Model};
use crate::common::difference;
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use lora::merge::add_weighted;
use loralib as lora;
use loralib::{formats, Adapter, Adapters, Bias, LoraConfig, LoraWeights, Result};
use std::collections::HashMap;

pub const CFG: LoraConfig = LoraConfig { use_dora: true, ..crate::adapter::CFG };

/// The base, the adapter and its output.
fn trained() -> Result<(HashMap<String, Tensor>, Adapter, Tensor)> {
    let base = base();
    let adapter = Adapter::new(CFG).targets(["qkv", "embed", "up_proj"]);
    let model = Model::new(adapter.var_builder(vb(&base)))?;
    let new = model.forward(&ids())?;
    let plain = Model::new(vb(&base))?.forward(&ids())?;
    assert!(difference(&new, &plain)? < 2e-6, "a new adapter changes nothing");
    randomize(&adapter)?;
    let y = model.forward(&ids())?;
    assert!(difference(&y, &plain)? > 1e-2);
    Ok((base, adapter, y))
}

fn output(vb: VarBuilder) -> Result<Tensor> {
    Ok(Model::new(vb)?.forward(&ids())?)
}

#[test]
fn a_trained_adapter_is_the_same_in_every_mode_and_file() -> Result<()> {
    let (base, adapter, y) = trained()?;
    assert_eq!(adapter.vars()?.len(), 3 * 4);
    let elements: usize = adapter.vars()?.iter().map(|var| var.elem_count()).sum();
    assert_eq!(adapter.summary()?.trainable(), elements);
    assert_eq!(adapter.summary()?.others.len(), 0);
    let same = |y2: Tensor| -> Result<()> {
        let apart = difference(&y2, &y)?;
        assert!(apart < 2e-6, "{apart}");
        Ok(())
    };
    let merged = |adapter: &Adapter| output(adapter.merged(vb(&base))?);
    same(merged(&adapter)?)?;
    let dir = tempfile::tempdir()?;
    let (own, peft) = (dir.path().join("own"), dir.path().join("peft"));
    adapter.save(&own)?;
    adapter.save_pretrained(&peft)?;
    for path in [own, peft] {
        let loaded = Adapter::load(&path, &Device::Cpu)?;
        assert!(loaded.config().lora.use_dora);
        let model = Model::new(loaded.var_builder(vb(&base)))?;
        same(model.forward(&ids())?)?;
        loaded.eval()?;
        same(model.forward(&ids())?)?;
        same(merged(&loaded)?)?;
        let other = Adapter::new(CFG).targets(["qkv", "embed", "up_proj"]);
        let model = Model::new(other.var_builder(vb(&base)))?;
        assert_eq!(other.restore(&path)?.loaded.len(), 3 * 4);
        same(model.forward(&ids())?)?;
    }
    Ok(())
}

#[test]
fn every_variable_has_its_gradient() -> Result<()> {
    let adapter = Adapter::new(CFG).targets(["qkv", "embed", "up_proj"]);
    let model = Model::new(adapter.var_builder(vb(&base())))?;
    randomize(&adapter)?;
    let grads = model.forward(&ids())?.sqr()?.sum_all()?.backward()?;
    for var in adapter.vars()? {
        assert!(grads.get(&var).is_some());
    }
    Ok(())
}

/// Finite differences see that the norm depends on the factors; the gradients leave it out.
#[test]
fn gradients_are_checked_by_the_magnitudes() -> Result<()> {
    let adapter = Adapter::new(CFG).targets(["qkv", "embed", "up_proj"]);
    let model = Model::new(adapter.var_builder(vb(&base())))?;
    randomize(&adapter)?;
    let loss = || model.forward(&ids())?.sqr()?.mean_all();
    lora::utils::check_grads(adapter.var_map(), &loss()?.backward()?, loss)?;
    let half = ((model.forward(&ids())?.sqr()? * 0.5)?.mean_all()?).backward()?;
    let error = lora::utils::check_grads(adapter.var_map(), &half, loss).unwrap_err().to_string();
    assert!(error.contains("qkv.lora_magnitude_vector") && !error.contains("lora_B"), "{error}");
    Ok(())
}

#[test]
fn among_others_it_serves_alone() -> Result<()> {
    let (base, adapter, y) = trained()?;
    adapter.eval()?;
    let adapters = Adapters::new();
    let model = Model::new(adapters.var_builder(vb(&base)))?;
    adapters.add("dora", &adapter)?;
    let forward = || model.forward(&ids());
    let apart = difference(&adapters.with("dora", forward)?, &y)?;
    assert!(apart < 2e-6, "{apart}");
    let errors = [
        adapters.with([("dora", 0.5)], forward).unwrap_err().to_string(),
        adapters.with_rows(&[Some("dora"), None], forward).unwrap_err().to_string(),
        adapters.sum("dora").unwrap_err().to_string(),
    ];
    for error in errors {
        assert!(error.contains("\"dora\"") && error.contains("alone"), "{error}");
    }
    Ok(())
}

#[test]
fn formats_without_magnitudes_refuse_it_with_the_way_out() -> Result<()> {
    let (_, adapter, _) = trained()?;
    let tensors = lora::lora_state_dict(adapter.var_map(), Bias::None)?;
    let weights = LoraWeights::new(adapter.config(), tensors)?.in_component("unet");
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.safetensors");
    let errors = [
        formats::kohya::save(&path, &weights),
        formats::diffusers::save(&path, &weights),
        formats::peft::save_plain(&path, &weights),
    ];
    for error in errors {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("merge"), "{error}");
    }
    let error = add_weighted(&[(&weights, 1.)]).unwrap_err().to_string();
    assert!(error.contains("lora_magnitude_vector"), "{error}");
    assert!(!path.exists());
    Ok(())
}

/// Half of it would be a plain LoRA of another effect.
#[test]
fn magnitudes_and_the_option_belong_together() -> Result<()> {
    let (base, adapter, _) = trained()?;
    let dir = tempfile::tempdir()?;
    let mut tensors = lora::lora_state_dict(adapter.var_map(), Bias::None)?;
    let plain = LoraConfig { use_dora: false, ..CFG };
    let check = |tensors: &lora::utils::StateDict, cfg| {
        let errors = [
            lora::save_state_dict(tensors, cfg, dir.path().join("a")).unwrap_err().to_string(),
            LoraWeights::new(cfg, tensors.clone()).unwrap_err().to_string(),
        ];
        for error in errors {
            assert!(error.contains("use_dora"), "{error}");
        }
    };
    check(&tensors, plain);
    let other = Adapter::new(plain).targets(["qkv", "embed", "up_proj"]);
    let _model = Model::new(other.var_builder(vb(&base)))?;
    adapter.save(dir.path().join("dora"))?;
    let error = other.restore(dir.path().join("dora")).unwrap_err().to_string();
    assert!(error.contains("its use_dora is true"), "{error}");
    tensors.remove("embed.lora_magnitude_vector");
    check(&tensors, CFG);
    Ok(())
}
