//! A language model's saved folder keeps the rules of the servers that load it: vLLM and mistral.rs.

use crate::{folder, CPU};
use candle_core::{safetensors, DType};
use candle_nn::VarBuilder;
use lora::adapter::AdapterConfig;
use lora::nn::linear_no_bias;
use lora::{Adapter, LoraConfig};
use loralib as lora;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The (out, in) of each linear layer of a Llama, its head among them, without biases.
fn layers() -> BTreeMap<String, (usize, usize)> {
    let mut layers = BTreeMap::from([("lm_head".to_owned(), (32, 8))]);
    for i in 0..2 {
        for (name, shape) in [
            ("self_attn.q_proj", (8, 8)),
            ("self_attn.k_proj", (4, 8)),
            ("self_attn.v_proj", (4, 8)),
            ("self_attn.o_proj", (8, 8)),
            ("mlp.gate_proj", (12, 8)),
            ("mlp.up_proj", (12, 8)),
            ("mlp.down_proj", (8, 12)),
        ] {
            layers.insert(format!("model.layers.{i}.{name}"), shape);
        }
    }
    layers
}

/// What the servers would refuse, or pass over without a word.
fn broken(folder: &Path, max_rank: usize) -> lora::Result<Vec<String>> {
    let config: Value =
        serde_json::from_slice(&fs::read(folder.join("adapter_config.json"))?).unwrap();
    let mut broken = vec![];
    // vLLM, and mistral.rs with the same or a stricter rule.
    if !config["r"].as_u64().is_some_and(|r| (1..=max_rank as u64).contains(&r)) {
        broken.push(format!("r is {}", config["r"]));
    }
    if !config["lora_alpha"].is_number() {
        broken.push("no lora_alpha".to_owned());
    }
    let unset = |value: &Value| match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        value => [Value::Null, false.into(), "none".into()].contains(value),
    };
    for key in ["modules_to_save", "use_dora", "bias", "rank_pattern", "alpha_pattern"] {
        if !unset(&config[key]) {
            broken.push(format!("{key} is {}", config[key]));
        }
    }

    // Each target is a linear layer, and each tensor is a factor of a target, of the layer's shape.
    let (layers, r) = (layers(), config["r"].as_u64().unwrap_or(0) as usize);
    let targets = config["target_modules"].as_array().cloned().unwrap_or_default();
    let targets: BTreeSet<_> = targets.iter().filter_map(Value::as_str).collect();
    let tensors = safetensors::load(folder.join("adapter_model.safetensors"), &CPU)?;
    let mut expected = BTreeMap::new();
    for target in &targets {
        match layers.get(*target).filter(|_| *target != "lm_head") {
            Some(&(rows, columns)) => {
                let key = format!("base_model.model.{target}");
                expected.insert(format!("{key}.lora_A.weight"), vec![r, columns]);
                expected.insert(format!("{key}.lora_B.weight"), vec![rows, r]);
            }
            None => broken.push(format!("target {target}")),
        }
    }
    let saved: BTreeMap<_, _> =
        tensors.iter().map(|(k, t)| (k.clone(), t.dims().to_vec())).collect();
    for key in expected.keys().chain(saved.keys()).collect::<BTreeSet<_>>() {
        if saved.get(key) != expected.get(key) {
            broken.push(format!("{key}: {:?}", saved.get(key)));
        }
    }
    Ok(broken)
}

/// Saves an adapter of all layers but those of the head, as `lora train` does for a tied one.
fn save(adapter: &Adapter, folder: &Path) -> lora::Result<()> {
    let vb = adapter.var_builder(VarBuilder::zeros(DType::F32, &CPU));
    for (name, (rows, columns)) in layers().iter().filter(|(name, _)| *name != "lm_head") {
        linear_no_bias(*columns, *rows, vb.pp(name))?;
    }
    adapter.check()?;
    adapter.save_pretrained(folder)
}

#[test]
fn a_language_model_s_folder_is_one_that_servers_load() -> lora::Result<()> {
    let cfg = LoraConfig { r: 8, lora_alpha: 16., lora_dropout: 0.05, ..Default::default() };
    let config = AdapterConfig { task_type: Some("CAUSAL_LM".to_owned()), ..cfg.into() };
    for targets in [lora::adapter::Targets::all_linear(), ["q_proj", "v_proj"].into()] {
        let dir = tempfile::tempdir()?;
        save(&Adapter::new(config.clone()).targets(targets), dir.path())?;
        assert_eq!(broken(dir.path(), 16)?, [""; 0]);
    }
    let dir = tempfile::tempdir()?;
    save(&Adapter::new(LoraConfig { r: 32, ..cfg }).targets("all-linear"), dir.path())?;
    assert_eq!(broken(dir.path(), 16)?, ["r is 32"]);
    Ok(())
}

/// The check of the test above sees what the servers do not load.
#[test]
fn other_folders_are_not() -> lora::Result<()> {
    for (case, expected) in
        [("bias", "bias is "), ("modules", "modules_to_save is "), ("pattern", "rank_pattern is ")]
    {
        let broken = broken(&folder(case), 16)?;
        assert!(broken.iter().any(|rule| rule.starts_with(expected)), "{case}: {broken:?}");
    }
    Ok(())
}
