//! A mistake in targets, options or files is an error with the names; nothing is half applied.

use crate::adapter::{base, vb, Model};
use candle_core::{Device, Result, Tensor};
use loralib as lora;
use loralib::adapter::{AdapterConfig, Targets};
use loralib::layers::LayerKind;
use loralib::{nn as candle_nn, Adapter, Bias, Error, LoraConfig, LoraWeights};

const CPU: Device = Device::Cpu;

fn cfg() -> LoraConfig {
    LoraConfig { r: 2, lora_alpha: 3., ..Default::default() }
}

fn check(adapter: &Adapter) -> String {
    let _model = Model::new(adapter.var_builder(vb(&base()))).unwrap();
    adapter.check().unwrap_err().to_string()
}

#[test]
fn a_target_that_matches_nothing_is_named() {
    let error = check(&Adapter::new(cfg()).targets(["qkv", "q_proj"]));
    assert!(error.contains("[\"q_proj\"] match no layer"), "{error}");
    assert!(error.ends_with("named down_proj, embed, head, norm, qkv, up_proj"), "{error}");
    let error = check(&Adapter::new(cfg()).targets("q_proj"));
    assert!(error.contains("regular expressions of whole paths"), "{error}");
    let error = check(&Adapter::new(cfg()).targets("(qkv"));
    assert!(error.contains("(qkv") && error.contains("regular expression"), "{error}");
}

#[test]
fn targets_that_are_trained_whole_or_excluded_are_named() -> lora::Result<()> {
    let error = check(&Adapter::new(cfg()).targets(["head"]).trainable(Bias::None.and("head"))?);
    assert!(error.contains("\"head\" is trained as a whole"), "{error}");
    let error = check(&Adapter::new(cfg()).targets(["qkv"]).exclude(["qkv"]));
    assert!(error.contains("`exclude`") && error.contains("layers.0.qkv"), "{error}");
    Ok(())
}

/// The inner adapter's update would be lost.
#[test]
fn an_adapter_over_the_var_builder_of_another_is_an_error() -> lora::Result<()> {
    let [first, trained] = [(); 2].map(|()| Adapter::new(cfg()).targets(["qkv"]));
    let second = Adapter::new(cfg()).targets(["up_proj"]);
    let set = lora::Adapters::new();
    let inner = || first.var_builder(vb(&base()));
    for outer in [second.var_builder(inner()), set.var_builder(inner())] {
        let error = Model::new(outer).err().expect("an error").to_string();
        assert!(error.contains("`merged`") && error.contains(".weight"), "{error}");
    }
    Model::new(trained.var_builder(vb(&base())))?;
    let second = Adapter::new(cfg()).targets(["up_proj"]);
    Model::new(second.var_builder(trained.merged(vb(&base()))?))?;
    second.check()
}

#[test]
fn a_check_needs_a_model_on_lora_nn_and_something_to_train() {
    let adapter = Adapter::new(cfg()).targets(["qkv"]);
    let error = adapter.check().unwrap_err().to_string();
    assert!(error.contains("no model was built"), "{error}");
    let _candles = ::candle_nn::linear(8, 24, adapter.var_builder(vb(&base())).pp("layers.0.qkv"));
    let error = adapter.check().unwrap_err().to_string();
    assert!(error.contains("use loralib::nn as candle_nn;"), "{error}");
    assert!(check(&Adapter::new(LoraConfig::default()).targets(["qkv"])).contains("r = 0"));
    assert!(check(&Adapter::new(cfg())).contains("nothing to train"));
}

#[test]
fn tensors_that_are_no_adapter_are_an_error() {
    let from = |config, name: &str| {
        let tensor = Tensor::zeros((2, 2), candle_core::DType::F32, &CPU).unwrap();
        let tensors = [(name.to_owned(), tensor)].into();
        let weights = LoraWeights::new(config, tensors);
        weights.and_then(|weights| Adapter::from_weights(&weights)).unwrap_err().to_string()
    };
    let error = from(cfg(), "base_model.model.q.lora_A.weight");
    assert!(error.contains("PEFT"), "{error}");
    let error = from(cfg(), "q.lora_down.weight");
    assert!(error.contains("no lora_A or lora_B, but") && error.contains("q.lora_down"), "{error}");
    let error = from(LoraConfig::default(), "q.lora_down.weight");
    assert!(error.contains("no lora_A and lora_B, but \"q.lora_down.weight\""), "{error}");
}

/// The state has factors of the adapter, and the moments of each.
#[test]
fn the_state_of_a_run_is_no_adapter() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let adapter = Adapter::new(cfg()).targets(["qkv"]);
    let _model = Model::new(adapter.var_builder(vb(&base())))?;
    let mut opt = lora::train::AdamW::named(adapter.named_vars()?, Default::default())?;
    opt.save(&path, &3)?;
    let tensors = lora::read_state_dict(&path, &CPU)?.tensors;
    let errors = [
        Adapter::load(&path, &CPU).unwrap_err(),
        adapter.restore(&path).unwrap_err(),
        LoraWeights::new(cfg(), tensors.clone()).unwrap_err(),
        lora::save_state_dict(&tensors, cfg(), folder.path().join("out")).unwrap_err(),
    ];
    for error in errors.map(|error| error.to_string()) {
        assert!(error.contains("`train::AdamW::load`"), "{error}");
    }
    let error = opt.load::<Vec<u32>>(&path).unwrap_err().to_string();
    assert!(error.contains("progress 3 is not what `load` expects"), "{error}");
    Ok(())
}

#[test]
fn a_file_is_restored_into_a_model_that_is_built() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    let new = || Adapter::new(cfg()).targets(["qkv", "up_proj", "down_proj"]);
    let adapter = new();
    let _model = Model::new(adapter.var_builder(vb(&base())))?;
    adapter.save(&path)?;
    let error = new().restore(&path).unwrap_err().to_string();
    assert!(error.contains("no model was built"), "{error}");
    let other = Adapter::new(cfg()).targets(["embed"]);
    let _model = Model::new(other.var_builder(vb(&base())))?;
    let error = other.restore(&path).unwrap_err().to_string();
    let more = adapter.named_vars()?.len() - 6;
    assert!(error.ends_with(&format!("and {more} more")), "{error}");
    Ok(())
}

#[test]
fn an_excluded_expression_that_is_invalid_is_named() {
    let error = check(&Adapter::new(cfg()).targets(["qkv"]).exclude("(head"));
    assert!(error.contains("(head") && error.contains("regular expression"), "{error}");
}

#[test]
fn all_linear_without_a_linear_layer_is_an_error() {
    let error = check(&Adapter::new(cfg()).targets(Targets::all_linear()).exclude(".*"));
    assert!(error.contains("all-linear"), "{error}");
}

#[test]
fn biases_of_adapted_layers_need_named_targets() -> lora::Result<()> {
    let adapter = Adapter::new(cfg()).targets("all-linear").trainable(Bias::LoraOnly)?;
    let _model = Model::new(adapter.var_builder(vb(&base())))?;
    let error = adapter.check().unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("LoraOnly"), "{error}");
    Ok(())
}

#[test]
fn a_pattern_of_layers_that_selects_nothing_is_told() {
    let adapter = || Adapter::new(cfg()).targets(["up_proj"]);
    let error = check(&adapter().layers_pattern(["layers"]));
    assert!(error.contains("layers") && error.contains("indices"), "{error}");
    let error = check(&adapter().layers([1]).layers_pattern(["layers("]));
    assert!(error.contains("layers(") && error.contains("regular expression"), "{error}");
    // As in PEFT, an index needs two components before it without a pattern.
    let error = check(&adapter().layers([1]));
    assert!(error.contains("up_proj") && error.contains("layers_pattern"), "{error}");
    let error = check(&adapter().layers([9]).layers_pattern(["layers"]));
    assert!(error.contains("up_proj") && !error.contains("layers_pattern"), "{error}");
}

#[test]
fn options_that_change_after_var_builder_are_an_error() {
    let adapter = Adapter::new(cfg()).targets(["qkv"]);
    let _model = Model::new(adapter.var_builder(vb(&base()))).unwrap();
    adapter.check().unwrap();
    let error = adapter.targets(["qkv", "up_proj"]).check().unwrap_err().to_string();
    assert!(error.contains("var_builder"), "{error}");
}

#[test]
fn a_weight_that_no_layer_takes_is_named() -> Result<()> {
    for targets in [Targets::from(["qkv", "down_proj"]), Targets::all_linear()] {
        let adapter = Adapter::new(cfg()).targets(targets);
        let vb = adapter.var_builder(vb(&base()));
        let _norm = candle_nn::rms_norm(8, 1e-5, vb.pp("norm"))?;
        let _taken = candle_nn::linear(8, 24, vb.pp("layers.0.qkv"))?;
        let weight = vb.get((8, 8), "layers.1.down_proj.weight")?;
        let _not = candle_nn::Linear::new(weight.t()?, None);
        let error = adapter.check().unwrap_err().to_string();
        assert!(error.contains("layers.1.down_proj.weight"), "{error}");
    }
    Ok(())
}

#[test]
fn an_adaptation_that_fails_in_a_constructor_is_told_by_check() {
    let config =
        AdapterConfig::from(cfg()).with_layer("qkv", LayerKind::MergedLinear(vec![true; 5]));
    let error = check(&Adapter::new(config).targets(["qkv"]));
    assert!(error.contains("layers.0.qkv.weight"), "{error}");
    let config = AdapterConfig::from(cfg()).with_layer("embed", LayerKind::Linear);
    let error = check(&Adapter::new(config).targets(["embed"]));
    assert!(error.contains("embed.weight"), "{error}");
    assert!(error.contains("is a Embedding, declared as a Linear"), "{error}");
    let config = LoraConfig { fan_in_fan_out: true, ..cfg() };
    assert!(check(&Adapter::new(config).targets(["qkv"])).contains("fan_in_fan_out"));
    let config = LoraConfig { lora_alpha: f64::NAN, ..cfg() };
    assert!(check(&Adapter::new(config).targets(["qkv"])).contains("lora_alpha"));
}

#[test]
fn merged_names_what_the_base_lacks_and_what_does_not_fit() -> lora::Result<()> {
    let all = base();
    let adapter = Adapter::new(cfg()).targets(["down_proj"]);
    Model::new(adapter.var_builder(vb(&all)))?;
    let mut less = all.clone();
    less.remove("layers.1.down_proj.weight");
    let error = adapter.merged(vb(&less)).err().unwrap().to_string();
    assert!(error.contains("layers.1.down_proj.weight"), "{error}");
    let mut other = all.clone();
    let name = "layers.1.down_proj.weight";
    other.insert(name.to_owned(), Tensor::zeros((8, 9), candle_core::DType::F32, &CPU)?);
    let error = adapter.merged(vb(&other))?.get((8, 9), name).unwrap_err().to_string();
    assert!(error.contains(name), "{error}");
    Ok(())
}

#[test]
fn a_merge_that_is_not_finite_changes_no_layer() -> lora::Result<()> {
    let adapter = Adapter::new(cfg()).targets(["qkv", "up_proj"]);
    let model = Model::new(adapter.var_builder(vb(&base())))?;
    let ids = Tensor::new(&[[1u32, 2]], &CPU)?;
    for var in adapter.vars()?.iter().rev().take(1) {
        var.set(&(var.ones_like()? * f64::NAN)?)?;
    }
    for (name, var) in adapter.var_map().data().lock().unwrap().iter() {
        if name == "layers.2.up_proj.lora_A" {
            var.set(&(var.ones_like()? * f64::NAN)?)?;
        }
    }
    let error = adapter.eval().unwrap_err().to_string();
    assert!(error.contains("layers.2.up_proj") && error.contains("finite"), "{error}");
    assert!(model.forward(&ids)?.track_op(), "still in training");
    Ok(())
}

#[test]
fn an_adapter_for_another_model_is_an_error() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.safetensors");
    let adapter = Adapter::new(cfg()).targets(["qkv", "up_proj"]);
    Model::new(adapter.var_builder(vb(&base())))?;
    adapter.save(&path)?;
    let loaded = Adapter::load(&path, &CPU)?;
    let vb = loaded.var_builder(vb(&base()));
    let _part = candle_nn::linear(8, 24, vb.pp("layers.0.qkv"))?;
    let error = loaded.check().unwrap_err().to_string();
    assert!(error.contains("up_proj"), "{error}");
    let other = LoraConfig { r: 4, ..cfg() };
    let other = Adapter::new(other).targets(["qkv", "up_proj"]);
    Model::new(other.var_builder(crate::adapter::vb(&base())))?;
    let error = other.restore(&path).unwrap_err().to_string();
    assert!(error.contains("rank is 2") && error.contains("lora_"), "{error}");
    std::fs::write(&path, b"junk")?;
    assert!(Adapter::load(&path, &CPU).unwrap_err().to_string().contains("a.safetensors"));
    Ok(())
}
