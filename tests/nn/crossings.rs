//! Adapters whose layers and tensors differ from each other, in models that have a part of them.

use super::adapter::CFG;
use crate::common::rnd;
use candle_core::{DType, Device, Tensor};
use lora::adapter::{AdapterConfig, LayerConfig};
use lora::layers::LayerKind;
use lora::utils::StateDict;
use lora::{formats::peft, merge, nn, Adapter, Adapters, Bias, LoraWeights};
use loralib as lora;
use nn::VarBuilder;
use std::collections::HashMap;

const CPU: Device = Device::Cpu;

fn tensor(seed: u64, dims: &[usize]) -> Tensor {
    rnd(seed, dims, DType::F32).unwrap().to_device(&CPU).unwrap()
}

fn pair(path: &str) -> [(String, Tensor); 2] {
    let name = |last: &str| [path, last].join(if path.is_empty() { "" } else { "." });
    [(name("lora_A"), tensor(1, &[2, 4])), (name("lora_B"), tensor(2, &[4, 2]))]
}

/// Layers q and k, of which k has an alpha of its own.
fn weights() -> LoraWeights {
    let mut config = AdapterConfig::from(CFG);
    config.layers.insert("q".to_owned(), LayerConfig::default());
    config
        .layers
        .insert("k".to_owned(), LayerConfig { lora_alpha: Some(8.), ..Default::default() });
    LoraWeights::new(config, [pair("q"), pair("k")].into_iter().flatten().collect()).unwrap()
}

fn base(outputs: usize) -> VarBuilder<'static> {
    let names = ["q", "k", "head"];
    let dims = [[outputs, 4], [4, 4], [4, 4]];
    let tensors = names.iter().zip(dims).map(|(n, d)| (format!("{n}.weight"), tensor(3, &d)));
    VarBuilder::from_tensors(tensors.collect(), DType::F32, &CPU)
}

fn layer(vb: &VarBuilder, name: &str) -> lora::Result<nn::Linear> {
    Ok(nn::linear_no_bias(4, 4, vb.pp(name))?)
}

#[test]
fn a_model_with_a_part_of_a_loaded_adapter_keeps_the_other_options() -> lora::Result<()> {
    let adapter = Adapter::from_weights(&weights())?;
    let _q = layer(&adapter.var_builder(base(4)), "q")?;
    assert_eq!(adapter.config().lora_config("k").lora_alpha, 8.);
    Ok(())
}

#[test]
fn a_second_model_that_fails_leaves_the_options_of_the_first() -> lora::Result<()> {
    let mut config = AdapterConfig::from(CFG);
    config
        .layers
        .insert("q".to_owned(), LayerConfig { lora_alpha: Some(8.), ..Default::default() });
    let adapter = Adapter::new(config).targets(["q"]);
    let _q = layer(&adapter.var_builder(base(4)), "q")?;
    adapter.check()?;
    let _ = nn::linear_no_bias(4, 6, adapter.var_builder(base(6)).pp("q"));
    assert!(adapter.check().is_err());
    assert_eq!(adapter.weights()?.lora_config("q").map(|cfg| cfg.lora_alpha), Some(8.));
    Ok(())
}

#[test]
fn a_layer_without_an_update_is_not_saved() -> lora::Result<()> {
    let none = [
        LayerConfig { r: Some(0), ..Default::default() },
        LayerConfig { kind: Some(LayerKind::MergedLinear(vec![false; 2])), ..Default::default() },
    ];
    for own in none {
        let mut config = AdapterConfig::from(CFG);
        config.layers.insert("k".to_owned(), own);
        let adapter = Adapter::new(config).targets(["q", "k"]);
        let vb = adapter.var_builder(base(4));
        let (_q, _k) = (layer(&vb, "q")?, layer(&vb, "k")?);
        adapter.check()?;
        assert_eq!(adapter.weights()?.layers().map(|(path, _)| path).collect::<Vec<_>>(), ["q"]);
        assert!(adapter.config().layers.contains_key("k"));
    }
    Ok(())
}

#[test]
fn an_adapter_of_a_head_alone_is_merged() -> lora::Result<()> {
    let mut config = AdapterConfig::from(CFG);
    config.modules_to_save = vec!["head".to_owned()];
    let head = tensor(9, &[4, 4]);
    let weights = LoraWeights::new(config, [("head.weight".to_owned(), head.clone())].into())?;
    let merged = Adapter::from_weights(&weights)?.merged(base(4))?.get((4, 4), "head.weight")?;
    assert_eq!(merged.to_vec2::<f32>()?, head.to_vec2::<f32>()?);
    Ok(())
}

/// PEFT saves the tables of a resized vocabulary, of which its configuration does not tell.
#[test]
fn a_table_beside_an_adapter_replaces_the_base_s_and_is_kept() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    peft::save(&dir, &weights())?;
    let file = dir.path().join("adapter_model.safetensors");
    let (mut tensors, table) = (candle_core::safetensors::load(&file, &CPU)?, tensor(9, &[4, 4]));
    tensors.insert("base_model.model.lm_head.weight".to_owned(), table.clone());
    candle_core::safetensors::save(&tensors, &file)?;

    let adapter = Adapter::load(&dir, &CPU)?;
    assert!(!adapter.named_vars()?.contains_key("lm_head.weight"), "it is not trained");
    let of_base =
        HashMap::from(["q", "k", "lm_head"].map(|n| (format!("{n}.weight"), tensor(3, &[4, 4]))));
    let base = || VarBuilder::from_tensors(of_base.clone(), DType::F32, &CPU);
    let vb = adapter.var_builder(base());
    let layers = [layer(&vb, "q")?, layer(&vb, "k")?, layer(&vb, "lm_head")?];
    adapter.check()?;
    let table = table.to_vec2::<f32>()?;
    assert_eq!(layers[2].weight().to_vec2::<f32>()?, table);
    let merged = adapter.merged(base())?.get((4, 4), "lm_head.weight")?;
    assert_eq!(merged.to_vec2::<f32>()?, table);
    let own = dir.path().join("own.safetensors");
    adapter.save(&own)?;
    let again = Adapter::load(&own, &CPU)?.weights()?.state_dict();
    assert_eq!(again["lm_head.weight"].to_vec2::<f32>()?, table);

    let set = Adapters::new();
    let vb = set.var_builder(base());
    let _layers = [layer(&vb, "q")?, layer(&vb, "k")?, layer(&vb, "lm_head")?];
    let error = set.add("resized", &adapter).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight"), "{error}");
    Ok(())
}

/// With `ensure_weight_tying` PEFT saves the table of a tied head too.
#[test]
fn an_equal_table_of_a_tied_head_is_passed_over() -> lora::Result<()> {
    let table = tensor(9, &[4, 4]);
    let mut config = AdapterConfig::from(CFG).with_layer("q", LayerKind::Linear);
    let without = config.clone();
    config.modules_to_save = vec!["embed".to_owned(), "lm_head".to_owned()];
    let tables = ["embed.weight", "lm_head.weight"].map(|name| (name.to_owned(), table.clone()));
    let tensors: StateDict = pair("q").into_iter().chain(tables).collect();
    let tied = HashMap::from(["q", "embed"].map(|n| (format!("{n}.weight"), tensor(3, &[4, 4]))));
    let adapter = Adapter::from_weights(&LoraWeights::new(config, tensors.clone())?)?;
    let vb = adapter.merged(VarBuilder::from_tensors(tied.clone(), DType::F32, &CPU))?;
    let (_q, embed) = (layer(&vb, "q")?, vb.get((4, 4), "embed.weight")?);
    adapter.check()?;
    assert_eq!(embed.to_vec2::<f32>()?, table.to_vec2::<f32>()?);

    // Not trained: it is no module of the adapter.
    let adapter = Adapter::from_weights(&LoraWeights::new(without, tensors)?)?;
    let vb = adapter.var_builder(VarBuilder::from_tensors(tied, DType::F32, &CPU));
    let (_q, _embed) = (layer(&vb, "q")?, nn::embedding(4, 4, vb.pp("embed"))?);
    adapter.check()
}

#[test]
fn layers_of_different_kinds_have_no_sum() -> lora::Result<()> {
    let of = |kind| weights().with_kind("q", kind);
    let (linear, embedding) = (of(LayerKind::Linear)?, of(LayerKind::Embedding)?);
    let error = merge::add_weighted(&[(&linear, 1.), (&embedding, 1.)]).unwrap_err().to_string();
    assert!(error.contains("q.lora_A") && error.contains("Embedding"), "{error}");
    assert!(merge::add_weighted(&[(&linear, 1.), (&weights(), 1.)]).is_ok());
    Ok(())
}

#[test]
fn a_component_is_a_layer_s_whole_path() -> lora::Result<()> {
    let root = LoraWeights::new(CFG, pair("").into())?;
    let part = root.in_component("unet");
    assert!(part.state_dict().keys().eq(["unet.lora_A", "unet.lora_B"]));
    assert!(part.component("unet")?.state_dict().keys().eq(root.state_dict().keys()));
    assert!(weights().in_component("").state_dict().keys().eq(weights().state_dict().keys()));
    Ok(())
}

#[test]
fn a_number_that_no_float_has_is_an_error() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    peft::save(&dir, &weights())?;
    let file = dir.path().join("adapter_config.json");
    let json =
        std::fs::read_to_string(&file)?.replacen("\"k\": 8", "\"k\": 8, \"other\": 1e400", 1);
    std::fs::write(&file, json)?;
    let error = peft::load(&dir, &CPU).unwrap_err().to_string();
    assert!(error.contains("alpha_pattern") && error.contains("1e400"), "{error}");
    let json = std::fs::read_to_string(&file)?.replacen('{', "{\"unknown\": 1e400,", 1);
    std::fs::write(&file, json.replace(", \"other\": 1e400", ""))?;
    let error = peft::load(&dir, &CPU).unwrap_err().to_string();
    assert!(error.contains("unknown = 1e400"), "{error}");
    Ok(())
}

#[test]
fn an_adapter_that_trains_nothing_says_why() -> lora::Result<()> {
    let adapter = Adapter::new(CFG).trainable(Bias::All)?;
    let error = adapter.state_dict().unwrap_err().to_string();
    assert!(error.contains("no targets"), "{error}");
    Ok(())
}

#[test]
fn a_loaded_adapter_restores_its_own_file() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    let head = ("new.weight".to_owned(), tensor(9, &[4, 4]));
    let tensors = pair("q").into_iter().chain([head]).collect();
    let adapter = Adapter::from_weights(&LoraWeights::new(CFG, tensors)?)?;
    let vb = adapter.var_builder(base(4));
    // The base lacks it.
    assert!(vb.contains_tensor("new.weight"));
    let _layers = [layer(&vb, "q")?, layer(&vb, "new")?];
    adapter.check()?;
    adapter.save(&path)?;
    let report = adapter.restore(&path)?;
    assert_eq!((report.loaded.len(), report.unexpected.len()), (2, 0));
    Ok(())
}

#[test]
fn a_head_that_the_adapter_adds_may_have_an_update() -> lora::Result<()> {
    let config = AdapterConfig::from(CFG).with_layer("new", LayerKind::Linear);
    let head = ("new.weight".to_owned(), tensor(9, &[4, 4]));
    let tensors = pair("new").into_iter().chain([head.clone()]).collect();
    let weights = LoraWeights::new(config, tensors)?;
    let merged = Adapter::from_weights(&weights)?.merged(base(4))?.get((4, 4), "new.weight")?;
    let expected = merge::merge_into(
        &[head].into(),
        &LoraWeights::new(
            AdapterConfig::from(CFG).with_layer("new", LayerKind::Linear),
            pair("new").into(),
        )?,
    )?;
    assert_eq!(merged.to_vec2::<f32>()?, expected["new.weight"].to_vec2::<f32>()?);
    Ok(())
}

#[test]
fn options_of_a_layer_stay_its_own_when_a_model_builds_another() -> lora::Result<()> {
    let tensors = [pair("q"), pair("a.q")].into_iter().flatten().collect();
    let adapter = Adapter::from_weights(&LoraWeights::new(CFG, tensors)?)?;
    let _q = nn::embedding(4, 4, adapter.var_builder(base(4)).pp("q"))?;
    assert_eq!(adapter.config().kind("q"), Some(&LayerKind::Embedding));
    assert_eq!(adapter.config().kind("a.q"), None);
    Ok(())
}

#[test]
fn a_component_has_the_modules_of_its_tensors() -> lora::Result<()> {
    let mut config = AdapterConfig::from(CFG);
    config.modules_to_save = ["unet.head", "text_encoder.tail"].map(str::to_owned).into();
    let others = ["unet.head.weight", "text_encoder.tail.weight"]
        .map(|name| (name.to_owned(), tensor(9, &[4, 4])));
    let tensors = pair("unet.q").into_iter().chain(others).collect();
    let unet = LoraWeights::new(config, tensors)?.component("unet")?;
    assert_eq!(unet.config().modules_to_save, ["head"]);
    let saved = Adapter::from_weights(&unet)?.state_dict()?;
    assert!(saved.keys().eq(["head.weight", "q.lora_A", "q.lora_B"]));
    Ok(())
}
