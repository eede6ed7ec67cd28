//! Adapters that PEFT saved: merged weights and outputs agree with PEFT, and saving them again changes
//! nothing.

use crate::common::{bits, difference};
use crate::{folder, model, CPU};
use candle_core::{DType, Module};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};
use lora::formats::peft;
use lora::layers::LayerKind;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::{Bias, LoraConfig, LoraWeights};
use loralib as lora;
use std::collections::HashMap;

const CASES: [&str; 15] = [
    "linear",
    "bin",
    "rslora",
    "pattern",
    "embedding",
    "conv",
    "modules",
    "modules_end",
    "bias",
    "bias_lora_only",
    "gpt2",
    "embed_tokens",
    "order",
    "dora",
    "dora_gpt2",
];

/// What is merged, and not computed beside the base; and what only training needs.
const MERGED_CASES: [&str; 11] = [
    "lora_bias",
    "tokens",
    "tied_tokens",
    "parameters",
    "square_parameters",
    "experts_without_gate",
    "mica",
    "velora",
    "pissa",
    "tied_head",
    "tied_table",
];

/// The merged weights as PEFT's merge gives them. It loses the head of its own model where the base ties it to a table that
/// has an adapter: that is the base's table.
fn merged_as_peft(base: &StateDict, weights: &LoraWeights) -> lora::Result<StateDict> {
    let mut merged = merge_into(base, weights)?;
    for (head, table) in [
        ("lm_head.weight", "transformer.wte.weight"),
        ("lm_head.weight", "model.embed_tokens.weight"),
    ] {
        if !base.contains_key(head) && base.contains_key(table) {
            if let Some(own) = merged.remove(head) {
                assert_eq!(difference(&own, &base[table])?, 0.);
            }
        }
    }
    Ok(merged)
}

#[test]
fn merged_weights_agree_with_peft() -> lora::Result<()> {
    for case in CASES.into_iter().chain(MERGED_CASES) {
        let [base, merged, ..] = model(case)?;
        let ours = merged_as_peft(&base, &peft::load(folder(case), &CPU)?)?;
        assert!(ours.keys().eq(merged.keys()), "{case}");
        let (mut apart, mut changed) = (0f64, 0);
        for (name, tensor) in &ours {
            apart = apart.max(difference(tensor, &merged[name])?);
            changed += usize::from(difference(tensor, &base[name])? > 1e-3);
        }
        println!("{case}: {changed} tensors changed, apart {apart:.1e}");
        assert!(apart < 1e-6, "{case}: {apart}");
        assert!(changed >= 2, "{case}: {changed}");
    }
    Ok(())
}

#[test]
fn outputs_agree_with_peft() -> lora::Result<()> {
    for case in CASES {
        let [base, _, x, y] = model(case)?;
        let weights = peft::load(folder(case), &CPU)?;
        let config = weights.config();
        let mut tensors: HashMap<_, _> = base.into_iter().collect();
        tensors.extend(weights.state_dict());
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
        let mut apart = 0f64;
        for (path, x) in &x {
            let cfg = LoraConfig { lora_dropout: 0., ..config.lora_config(path) };
            let (vb, y) = (vb.pp(path), &y[path]);
            let w = vb.get_unchecked("weight")?;
            let d = w.dims();
            let bias = vb.contains_tensor("bias");
            let ours = match (config.kind(path), w.rank()) {
                (Some(LayerKind::Embedding), _) => {
                    lora::embedding(d[0], d[1], cfg, vb)?.forward(x)?
                }
                (_, 2) if cfg.fan_in_fan_out => lora::linear(d[0], d[1], cfg, vb)?.forward(x)?,
                (_, 2) => lora::layers::linear_b(d[1], d[0], bias, cfg, vb)?.forward(x)?,
                (_, 3) => {
                    let options = Conv1dConfig::default();
                    lora::conv1d(d[1], d[0], d[2], options, cfg, vb)?.forward(x)?
                }
                (_, 4) => {
                    let options = Conv2dConfig::default();
                    lora::conv2d_no_bias(d[1], d[0], d[2], options, cfg, vb)?.forward(x)?
                }
                _ => {
                    let options = lora::layers::Conv3dConfig::default();
                    lora::conv3d(d[1], d[0], d[2], options, cfg, vb)?.forward(x)?
                }
            };
            apart = apart.max(difference(&ours, y)?);
        }
        println!("{case}: outputs apart {apart:.1e}");
        assert!(apart < 2e-6, "{case}: {apart}");
    }
    Ok(())
}

/// `enable_lora`, until PEFT 0.2.
#[test]
fn merged_layers_of_peft_0_2_are_read_and_saved_in_today_s_format() -> lora::Result<()> {
    let [base, merged, x, y] = model("enable_lora")?;
    let weights = peft::load(folder("enable_lora"), &CPU)?;
    let config = weights.config();
    let enabled = [true, false, true];
    let mut tensors: HashMap<_, _> = base.clone().into_iter().collect();
    tensors.extend(weights.state_dict());
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    for (path, x) in &x {
        assert_eq!(config.kind(path), Some(&LayerKind::MergedLinear(enabled.to_vec())));
        let layer = lora::merged_linear(6, 12, &enabled, config.lora_config(path), vb.pp(path))?;
        assert!(difference(&layer.forward(x)?, &y[path])? < 2e-6, "{path}");
    }
    let dir = tempfile::tempdir()?;
    peft::save(dir.path(), &weights)?;
    for weights in [weights, peft::load(dir.path(), &CPU)?] {
        for (name, tensor) in merge_into(&base, &weights)? {
            assert!(difference(&tensor, &merged[&name])? < 1e-6, "{name}");
        }
    }
    Ok(())
}

#[test]
fn layer_options_are_read() -> lora::Result<()> {
    let config = peft::load(folder("pattern"), &CPU)?.config();
    let own = |path: &str| (config.lora_config(path).r, config.lora_config(path).lora_alpha);
    assert_eq!(own("layers.0.q"), (5, 7.));
    assert_eq!(own("layers.1.q"), (3, 7.));
    assert_eq!(own("layers.0.o"), (3, 4.5));
    assert_eq!(own("layers.1.o"), (2, 4.5));
    let config = peft::load(folder("rslora"), &CPU)?.config();
    assert!(config.lora.rslora);
    assert_eq!(config.lora_config("layers.0.q").scaling(), 7. / 3f64.sqrt());
    let weights = peft::load(folder("modules"), &CPU)?;
    assert_eq!(weights.config().modules_to_save, ["head"]);
    assert_eq!(weights.state_dict()["head.weight"].dims(), [3, 6]);
    // Written as "head", "v1" and the head of another model.
    let adapter = lora::Adapter::load(folder("modules_end"), &CPU)?;
    assert_eq!(adapter.config().modules_to_save, ["head", "conv1"]);
    assert!(adapter.state_dict()?.contains_key("conv1.weight"));
    let weights = peft::load(folder("bias"), &CPU)?;
    assert_eq!(weights.config().bias, Bias::All);
    let tensors = weights.state_dict();
    assert!(tensors.contains_key("layers.0.q.bias") && tensors.contains_key("conv1.bias"));
    let config = peft::load(folder("gpt2"), &CPU)?.config();
    assert_eq!(config.task_type.as_deref(), Some("CAUSAL_LM"));
    assert!(config.lora_config("transformer.h.0.attn.c_attn").fan_in_fan_out);
    assert!(!config.lora_config("transformer.wte").fan_in_fan_out);
    Ok(())
}

/// Saving a loaded adapter gives PEFT's keys and values, and an equal configuration.
#[test]
fn peft_folders_are_saved_unchanged() -> lora::Result<()> {
    for case in CASES.into_iter().chain(MERGED_CASES) {
        let weights = peft::load(folder(case), &CPU)?;
        let dir = tempfile::tempdir()?;
        peft::save(dir.path(), &weights)?;
        let again = peft::load(dir.path(), &CPU)?;
        let [base, merged, ..] = model(case)?;
        for (name, tensor) in merged_as_peft(&base, &again)? {
            assert!(difference(&tensor, &merged[&name])? < 1e-6, "{case} {name}");
        }
        if !["bin", "lora_bias", "velora"].contains(&case) {
            let file = "adapter_model.safetensors";
            let ours = lora::read_state_dict(dir.path().join(file), &CPU)?.tensors;
            let theirs = lora::read_state_dict(folder(case).join(file), &CPU)?.tensors;
            assert!(ours.keys().eq(theirs.keys()), "{case}");
            for (name, tensor) in &ours {
                assert_eq!(bits(tensor)?, bits(&theirs[name])?, "{case} {name}");
            }
            assert_eq!(again.config(), weights.config(), "{case}");
        }
    }
    Ok(())
}

#[test]
fn dense_update_loads_as_merged_linear() -> lora::Result<()> {
    let [base, merged, ..] = model("gpt2")?;
    let kind = LayerKind::MergedLinear(vec![true; 3]);
    let weights = peft::load(folder("gpt2"), &CPU)?;
    let merged_linear = weights.clone().with_kind("c_attn", kind)?;
    let a = &merged_linear.state_dict()["transformer.h.0.attn.c_attn.lora_A"];
    assert_eq!(a.dims(), [6, 8]);
    for (name, tensor) in merged_as_peft(&base, &merged_linear)? {
        assert!(difference(&tensor, &merged[&name])? < 1e-6, "{name}");
    }
    let kind = LayerKind::MergedLinear(vec![true, false, true]);
    let error = weights.with_kind("c_attn", kind).unwrap_err();
    assert!(error.to_string().contains("c_attn.lora_A"), "{error}");
    Ok(())
}
