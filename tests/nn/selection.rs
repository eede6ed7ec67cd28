//! Which layers are targets, where the model or the selection is unusual.

use super::adapter::CFG;
use crate::common::randn;
use candle_core::{DType, Device};
use loralib::nn::{embedding, linear_no_bias, Linear, VarBuilder};
use loralib::{Adapter, Result};
use std::collections::HashMap;

/// A table of words, one of positions, and two layers.
fn base() -> Result<VarBuilder<'static>> {
    let names = ["wte", "embed_positions", "layers.0.q", "layers.0.k"];
    let tensor = |name| Ok((format!("{name}.weight"), randn(&[4, 4], DType::F32, &Device::Cpu)?));
    let tensors = names.into_iter().map(tensor).collect::<Result<HashMap<_, _>>>()?;
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

fn layer(vb: &VarBuilder, name: &str) -> Result<Linear> {
    Ok(linear_no_bias(4, 4, vb.pp(name))?)
}

/// As candle-transformers' bigcode does it.
#[test]
fn a_head_that_reads_the_table_s_tensor_itself_is_tied_to_it() -> Result<()> {
    for targets in ["all-linear", "wte|.*q"] {
        let adapter = Adapter::new(CFG).targets(targets);
        // Twice: the second model is adapted as the first.
        for _ in 0..2 {
            let vb = adapter.var_builder(base()?);
            let (table, head) = (embedding(4, 4, vb.pp("wte"))?, layer(&vb, "wte")?);
            let _q = layer(&vb, "layers.0.q")?;
            adapter.check()?;
            assert!(head.lora_a().is_none(), "{targets}");
            assert_eq!(table.lora_a().is_some(), targets != "all-linear");
        }
    }
    Ok(())
}

/// As Whisper's.
#[test]
fn all_linear_passes_over_a_table_of_positions_and_no_other_matrix() -> Result<()> {
    let adapter = Adapter::new(CFG).targets("all-linear");
    let vb = adapter.var_builder(base()?);
    let _positions = vb.pp("embed_positions").get((4, 4), "weight")?;
    let _q = layer(&vb, "layers.0.q")?;
    adapter.check()?;
    let _k = vb.pp("layers.0.k").get((4, 4), "weight")?;
    let error = adapter.check().unwrap_err().to_string();
    assert!(error.contains("layers.0.k.weight") && error.contains("exclude"), "{error}");
    Ok(())
}

/// Of all linear layers PEFT lists those that it excludes, too.
#[test]
fn targets_that_are_excluded_need_no_layer() -> Result<()> {
    let (dir, json) = (tempfile::tempdir()?, |targets: &str| {
        format!(
            r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": {targets},
                "exclude_modules": ["layers.0.k"]}}"#
        )
    });
    let check = |targets: &str| -> Result<()> {
        std::fs::write(dir.path().join("adapter_config.json"), json(targets))?;
        let adapter = Adapter::from_peft_config(dir.path())?;
        let vb = adapter.var_builder(base()?);
        let (_q, k) = (layer(&vb, "layers.0.q")?, layer(&vb, "layers.0.k")?);
        assert!(k.lora_a().is_none());
        adapter.check()
    };
    check(r#"["layers.0.q", "layers.0.k"]"#)?;
    let error = check(r#"["layers.0.q", "layers.0.v"]"#).unwrap_err().to_string();
    assert!(error.contains("layers.0.v"), "{error}");
    Ok(())
}

#[test]
fn an_expression_that_takes_too_many_steps_is_an_error() -> Result<()> {
    let path = "a".repeat(64);
    let tensors =
        HashMap::from([(format!("{path}.weight"), randn(&[4, 4], DType::F32, &Device::Cpu)?)]);
    let base = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let slow = r"(?=(a+)+b)(a|aa)+\1c";
    for adapter in
        [Adapter::new(CFG).targets(slow), Adapter::new(CFG).targets("all-linear").exclude(slow)]
    {
        let _layer = layer(&adapter.var_builder(base.clone()), &path)?;
        let error = adapter.check().unwrap_err().to_string();
        assert!(error.contains("(a|aa)+") && error.contains(&path), "{error}");
    }
    Ok(())
}

#[test]
fn many_layers_are_built_and_added_in_little_time() -> Result<()> {
    let count = 18_000;
    let weight = randn(&[4, 4], DType::F32, &Device::Cpu)?;
    let paths: Vec<_> =
        (0..count).map(|i| format!("layers.{}.experts.{}.up", i / 128, i % 128)).collect();
    let tensors = paths.iter().map(|path| (format!("{path}.weight"), weight.clone())).collect();
    let base = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let build =
        |vb: VarBuilder| paths.iter().map(|path| layer(&vb, path)).collect::<Result<Vec<_>>>();
    let start = std::time::Instant::now();
    let adapter = Adapter::new(CFG).targets(paths.clone());
    let _model = build(adapter.var_builder(base.clone()))?;
    adapter.check()?;
    let set = loralib::Adapters::new();
    let _served = build(set.var_builder(base.clone()))?;
    set.add("all", &adapter)?;
    // Less than a second: where every layer is compared with all others, minutes.
    assert!(start.elapsed().as_secs() < 15, "{:?}", start.elapsed());
    Ok(())
}

/// Of a model of one layer, say.
#[test]
fn a_layer_may_take_the_last_var_builder() -> Result<()> {
    let adapter = Adapter::new(CFG).targets(["q", "wte"]);
    let vb = adapter.var_builder(base()?).pp("layers.0.q");
    let q = linear_no_bias(4, 4, vb)?;
    let vb = adapter.var_builder(base()?).pp("wte");
    let table = embedding(4, 4, vb)?;
    assert!(q.lora_a().is_some() && table.lora_a().is_some());
    adapter.check()
}
