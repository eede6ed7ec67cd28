//! Options that are merged, and not computed beside the base, in an [`Adapter`]: it merges as PEFT does, keeps them in
//! its files, and refuses a model on its `var_builder`.

use crate::common::difference;
use crate::{folder, model, CPU};
use candle_core::DType;
use candle_nn::VarBuilder;
use lora::formats::peft;
use lora::merge::{merge_files, merge_into};
use lora::utils::StateDict;
use lora::{Adapter, LoraWeights};
use loralib as lora;
use std::collections::HashMap;

const CASES: [(&str, &str); 6] = [
    ("lora_bias", "layers.0.q.weight"),
    ("tokens", "embed.weight"),
    ("tied_tokens", "transformer.wte.weight"),
    ("parameters", "rows.experts.down_proj"),
    ("square_parameters", "columns.experts.down_proj"),
    ("experts_without_gate", "columns.experts.down_proj"),
];

fn vb(tensors: &StateDict) -> VarBuilder<'static> {
    let tensors: HashMap<_, _> = tensors.clone().into_iter().collect();
    VarBuilder::from_tensors(tensors, DType::F32, &CPU)
}

fn merges_as_peft(adapter: &Adapter, case: &str) -> lora::Result<()> {
    let [base, merged, ..] = model(case)?;
    let served = adapter.merged(vb(&base))?;
    for (name, expected) in &merged {
        let apart = difference(&served.get(expected.shape(), name)?, expected)?;
        assert!(apart < 2e-6, "{case} {name}: {apart}");
    }
    Ok(())
}

#[test]
fn an_adapter_merges_as_peft_and_keeps_every_option_in_its_files() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    for (case, _) in CASES {
        let adapter = Adapter::load(folder(case), &CPU)?;
        merges_as_peft(&adapter, case)?;
        assert!(adapter.summary()?.to_string().contains("lora_A"), "{case}");
        let (own, peft) = (dir.path().join(case), dir.path().join(format!("{case}.peft")));
        adapter.save(&own)?;
        merges_as_peft(&Adapter::load(&own, &CPU)?, case)?;
        adapter.save_pretrained(&peft)?;
        merges_as_peft(&Adapter::load(&peft, &CPU)?, case)?;
    }
    Ok(())
}

#[test]
fn merging_from_file_to_file_agrees_with_peft() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    for (case, _) in CASES {
        let [base, merged, ..] = model(case)?;
        let (from, to) = (dir.path().join("base.safetensors"), dir.path().join("out.safetensors"));
        candle_core::safetensors::save(&base.into_iter().collect::<HashMap<_, _>>(), &from)?;
        merge_files(&from, &peft::load(folder(case), &CPU)?, &to, |_| {})?;
        for (name, tensor) in lora::read_state_dict(&to, &CPU)?.tensors {
            assert!(difference(&tensor, &merged[&name])? < 2e-6, "{case} {name}");
        }
    }
    Ok(())
}

#[test]
fn a_model_with_parameters_beside_the_base_is_refused() -> lora::Result<()> {
    for (case, name) in CASES.into_iter().filter(|(_, name)| name.contains("experts")) {
        let [base, ..] = model(case)?;
        let adapter = Adapter::load(folder(case), &CPU)?;
        let error = adapter.var_builder(vb(&base)).get(base[name].shape(), name).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(name) && error.contains("Adapter::merged"), "{error}");
    }
    Ok(())
}

/// The fixture's adapter with other options and factors.
fn parameters(
    targets: serde_json::Value,
    change: impl Fn(&mut StateDict),
) -> lora::Result<LoraWeights> {
    let (source, dir) = (folder("parameters"), tempfile::tempdir()?);
    let json = std::fs::read(source.join("adapter_config.json"))?;
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    json["target_parameters"] = targets;
    std::fs::write(dir.path().join("adapter_config.json"), json.to_string())?;
    let file = "adapter_model.safetensors";
    let mut tensors = lora::read_state_dict(source.join(file), &CPU)?.tensors;
    change(&mut tensors);
    let tensors: HashMap<_, _> = tensors.into_iter().collect();
    candle_core::safetensors::save(&tensors, dir.path().join(file))?;
    peft::load(dir.path(), &CPU)
}

/// Keys have no parameter's name: the order of `target_parameters` tells it, and the base's shapes check it.
#[test]
fn parameters_in_another_order_are_refused() -> lora::Result<()> {
    let all = ["experts.gate_up_proj", "experts.down_proj", "rows.experts.scales", "router.weight"];
    let [base, ..] = model("parameters")?;
    merge_into(&base, &parameters(serde_json::json!(all), |_| {})?)?;
    let refused = |targets: &[&str], words: &[&str]| {
        let merged = parameters(serde_json::json!(targets), |_| {})
            .and_then(|weights| merge_into(&base, &weights));
        let error = merged.unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let [gate_up, down, scales, router] = all;
    refused(&[down, gate_up, scales, router], &["rows.experts", "the configuration's rank"]);
    refused(&[gate_up, down, router], &["rows.experts", "target_parameters", "3 pairs"]);
    refused(
        &["gate_up_proj", down, scales, router, "experts.up"],
        &["experts", "target_parameters"],
    );
    // Equal shapes leave the order as the only hint, which nothing would check.
    let equal = |all: &mut StateDict| {
        for last in ["lora_A", "lora_B"] {
            let key = |path| format!("base_model.model.columns.experts.{path}{last}.weight");
            all.insert(key("base_layer."), all[&key("")].clone());
        }
    };
    let unknown = ["experts.first", "experts.second", scales, router];
    let error = parameters(serde_json::json!(unknown), equal).unwrap_err().to_string();
    assert!(error.contains("columns.experts") && error.contains("equal shapes"), "{error}");
    Ok(())
}
