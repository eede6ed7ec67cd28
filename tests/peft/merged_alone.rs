//! Options that are merged, and not computed beside the base, in an [`Adapter`]: it merges as PEFT does, keeps them in
//! its files, and refuses a model on its `var_builder`.

use crate::common::difference;
use crate::{folder, model, CPU};
use candle_core::DType;
use candle_nn::VarBuilder;
use lora::{Adapter, StateDict};
use loralib as lora;
use std::collections::HashMap;

const CASES: [(&str, &str); 4] = [
    ("lora_bias", "layers.0.q.weight"),
    ("tokens", "embed.weight"),
    ("tied_tokens", "transformer.wte.weight"),
    ("parameters", "rows.experts.down_proj"),
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
        let (config, adapter) = lora::peft::load_pretrained(folder(case), &CPU)?;
        lora::merge_files(&from, &adapter, &config, &to, |_| {})?;
        for (name, tensor) in lora::read_state_dict(&to, &CPU)?.tensors {
            assert!(difference(&tensor, &merged[&name])? < 2e-6, "{case} {name}");
        }
    }
    Ok(())
}

#[test]
fn a_model_beside_the_base_is_refused() -> lora::Result<()> {
    for (case, name) in CASES {
        let [base, ..] = model(case)?;
        let adapter = Adapter::load(folder(case), &CPU)?;
        let error = adapter.var_builder(vb(&base)).get(base[name].shape(), name).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(name) && error.contains("Adapter::merged"), "{error}");
    }
    Ok(())
}
