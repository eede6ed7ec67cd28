//! An adapter with PiSSA's initial factors, by name, wherever an adapter can go.

use crate::adapter::{base, ids, vb, Model};
use crate::common::{bits, difference, randn};
use candle_core::{Device, Tensor};
use candle_nn::{Optimizer, ParamsAdamW};
use loralib::formats::{mlx, peft};
use loralib::layers::InitLoraWeights;
use loralib::merge::{add_weighted, merge_files};
use loralib::train::{AdamW, Fingerprint};
use loralib::{Adapter, Adapters, LoraConfig, LoraWeights, Result};
use std::collections::HashMap;

const CPU: Device = Device::Cpu;
const TARGETS: [&str; 3] = ["qkv", "down_proj", "up_proj"];
const PISSA: LoraConfig = LoraConfig {
    r: 2,
    lora_alpha: 3.,
    init_lora_weights: InitLoraWeights::Pissa,
    ..LoraConfig::DEFAULT
};

/// A trained adapter and the output of its model.
fn trained(base: &HashMap<String, Tensor>) -> Result<(Adapter, Model, Tensor)> {
    let adapter = Adapter::new(PISSA).targets(TARGETS);
    let model = Model::new(adapter.var_builder(vb(base)))?;
    adapter.check()?;
    let plain = Model::new(vb(base))?.forward(&ids())?;
    assert!(difference(&model.forward(&ids())?, &plain)? < 2e-6, "a new adapter changes nothing");
    for var in adapter.vars()? {
        var.set(&(var.as_tensor() + (randn(var.shape(), var.dtype(), &CPU)? * 0.3)?)?)?;
    }
    let y = model.forward(&ids())?;
    assert!(difference(&y, &plain)? > 1e-2);
    Ok((adapter, model, y))
}

#[test]
fn it_is_the_same_in_every_mode_model_and_file() -> Result<()> {
    let base = base();
    let (adapter, model, y) = trained(&base)?;
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let same = |what: &str, y2: Tensor| -> Result<()> {
        let apart = difference(&y2, &y)?;
        assert!(apart < 1e-5, "{what}: {apart}");
        Ok(())
    };
    let served = |what: &str, adapter: &Adapter| -> Result<()> {
        same(what, Model::new(adapter.merged(vb(&base))?)?.forward(&ids())?)?;
        let own = Model::new(adapter.var_builder(vb(&base)))?;
        same(what, own.forward(&ids())?)
    };
    served("merged", &adapter)?;
    adapter.eval()?;
    same("evaluation", model.forward(&ids())?)?;
    adapter.train()?;

    let weights = adapter.weights()?;
    adapter.save(path("own"))?;
    served("this crate's file", &Adapter::load(path("own"), &CPU)?)?;
    adapter.save_pretrained(path("peft"))?;
    served("PEFT's folder", &Adapter::load(path("peft"), &CPU)?)?;
    peft::save_plain(path("plain"), &weights)?;
    served("a plain folder", &Adapter::load(path("plain"), &CPU)?)?;
    mlx::save(path("mlx"), &weights)?;
    served("MLX's folder", &Adapter::from_weights(&mlx::load(path("mlx"), &CPU)?)?)?;
    served("its weights", &Adapter::from_weights(&weights)?)?;

    let file = path("base.safetensors");
    candle_core::safetensors::save(&base, &file)?;
    merge_files(&file, &weights, path("merged.safetensors"), |_| {})?;
    let merged = loralib::read_state_dict(path("merged.safetensors"), &CPU)?.tensors;
    same("a merged file", Model::new(vb(&merged.into_iter().collect()))?.forward(&ids())?)?;

    let other = Adapter::new(PISSA).targets(TARGETS);
    let model = Model::new(other.var_builder(vb(&base)))?;
    let _ = other.restore(path("own"))?;
    assert_eq!(bits(&model.forward(&ids())?)?, bits(&y)?, "restored");
    let unmerged = Adapter::new(LoraConfig { merge_weights: false, ..PISSA }).targets(TARGETS);
    let model = Model::new(unmerged.var_builder(vb(&base)))?;
    let _ = unmerged.restore(path("own"))?;
    unmerged.eval()?;
    same("unmerged evaluation", model.forward(&ids())?)?;
    let error = other.restore(path("peft")).expect_err("another rank").to_string();
    assert!(error.contains("rank is 4"), "{error}");
    Ok(())
}

#[test]
fn among_others_it_is_chosen_summed_and_one_of_the_rows() -> Result<()> {
    let base = base();
    let (adapter, _, y) = trained(&base)?;
    let adapters = Adapters::new();
    let model = Model::new(adapters.var_builder(vb(&base)))?;
    adapters.add("pissa", &adapter)?;
    let same = |what: &str, y2: &Tensor, y: &Tensor| -> Result<()> {
        let apart = difference(y2, y)?;
        assert!(apart < 1e-5, "{what}: {apart}");
        Ok(())
    };
    same("chosen", &adapters.with("pissa", || model.forward(&ids()))?, &y)?;
    adapter.eval()?;
    let rows = adapters.with_rows(&[Some("pissa"), None], || model.forward(&ids()))?;
    same("a row", &rows.get(0)?, &y.get(0)?)?;
    let sum = adapters.sum([("pissa", 1.)])?;
    same("a sum", &Model::new(sum.merged(vb(&base))?)?.forward(&ids())?, &y)
}

#[test]
fn only_the_factors_are_trained_counted_and_checked() -> Result<()> {
    let base = base();
    let (adapter, model, _) = trained(&base)?;
    let (named, frozen) = (adapter.named_vars()?, adapter.frozen_vars());
    assert_eq!((named.len(), frozen.len(), adapter.state_dict()?.len()), (8, 8, 16));
    let elements: usize = named.values().map(|var| var.elem_count()).sum();
    assert_eq!(adapter.summary()?.trainable(), elements);
    let loss = || model.forward(&ids())?.sqr()?.mean_all();
    let grads = loss()?.backward()?;
    assert!(loralib::missing_grads(adapter.var_map(), &grads).is_empty());
    loralib::utils::check_grads(adapter.var_map(), &grads, loss)?;
    assert!(frozen.values().all(|var| grads.get(var).is_none()));
    // Ranks compare them with the others.
    let all: std::collections::BTreeMap<_, _> = named.into_iter().chain(frozen.clone()).collect();
    let before = Fingerprint::new(&all)?;
    let first = &frozen["layers.0.qkv.lora_A_initial"];
    first.set(&(first.as_tensor() * 1.5)?)?;
    assert_ne!(format!("{:?}", Fingerprint::new(&all)?), format!("{before:?}"));
    Ok(())
}

/// The initial factors of the file count, not those of the base where the run goes on.
#[test]
fn a_run_goes_on_from_its_optimizer_s_file() -> Result<()> {
    let base = base();
    let path = tempfile::tempdir()?;
    let path = path.path().join("state.safetensors");
    let params = || ParamsAdamW { lr: 0.01, ..Default::default() };
    let start = |base: &HashMap<String, Tensor>| -> Result<(Adapter, Model, AdamW)> {
        let adapter = Adapter::new(PISSA).targets(TARGETS);
        let model = Model::new(adapter.var_builder(vb(base)))?;
        let opt =
            AdamW::named(adapter.named_vars()?, params())?.with_frozen(adapter.frozen_vars())?;
        Ok((adapter, model, opt))
    };
    let step = |model: &Model, opt: &mut AdamW| -> Result<()> {
        Ok(opt.backward_step(&model.forward(&ids())?.sqr()?.mean_all()?)?)
    };
    let (adapter, model, mut opt) = start(&base)?;
    step(&model, &mut opt)?;
    opt.save(&path, &())?;
    step(&model, &mut opt)?;
    let values = |adapter: &Adapter| -> Result<Vec<Vec<u64>>> {
        adapter.state_dict()?.values().map(|tensor| Ok(bits(tensor)?)).collect()
    };
    let (again, model, mut opt) = start(&base)?;
    // As another machine may decompose the base.
    for var in again.frozen_vars().values() {
        var.set(&(var.as_tensor() * 1.001)?)?;
    }
    opt.load::<()>(&path)?;
    step(&model, &mut opt)?;
    assert_eq!(values(&again)?, values(&adapter)?);
    let error = AdamW::named(again.named_vars()?, params())?.load::<()>(&path);
    assert!(error.is_err_and(|error| error.to_string().contains("_initial")));
    let twice = AdamW::named(again.named_vars()?, params())?.with_frozen(again.named_vars()?);
    assert!(twice.is_err_and(|error| error.to_string().contains("it is trained as")));
    Ok(())
}

/// By finite differences with the same masks, and through a checkpointed layer.
#[test]
fn gradients_are_right_under_dropout() -> Result<()> {
    for use_dora in [false, true] {
        let base = base();
        let cfg = LoraConfig { lora_dropout: 0.3, use_dora, ..PISSA };
        let adapter = Adapter::new(cfg).targets(TARGETS).seed(5);
        let model = Model::new(adapter.var_builder(vb(&base)))?;
        for var in adapter.vars()? {
            var.set(&(var.as_tensor() + (randn(var.shape(), var.dtype(), &CPU)? * 0.3)?)?)?;
        }
        let loss = || {
            adapter.set_dropout_position(0)?;
            model.forward(&ids())?.sqr()?.mean_all()
        };
        let grads = loss()?.backward()?;
        loralib::utils::check_grads(adapter.var_map(), &grads, loss)?;
    }
    Ok(())
}

#[test]
fn what_cannot_contain_them_says_so() -> Result<()> {
    let (adapter, ..) = trained(&base())?;
    let error = add_weighted(&[(&adapter.weights()?, 0.5)]).expect_err("no sum").to_string();
    assert!(error.contains("Adapter::load"), "{error}");
    let mut tensors = adapter.state_dict()?;
    for last in ["lora_A", "lora_B"] {
        let factor = tensors[&format!("layers.0.qkv.{last}")].clone();
        tensors.insert(format!("qkv.{last}_initial"), factor);
    }
    let error = LoraWeights::new(adapter.config(), tensors).expect_err("a half").to_string();
    assert!(error.contains("\"qkv.lora_A\""), "{error}");
    Ok(())
}
