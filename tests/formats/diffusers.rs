//! diffusers' files.

use crate::common::difference;
use crate::{assert_merged, assert_same, failed, fixture, model, tensors, zeros, CPU};
use candle_core::DType;
use candle_nn::VarBuilder;
use lora::formats::{diffusers, peft};
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

const FILE: &str = "pytorch_lora_weights.safetensors";

#[test]
fn merged_weights_agree_with_diffusers() -> lora::Result<()> {
    for case in ["new", "old", "processor"] {
        let case = format!("diffusers/{case}");
        assert_merged(&case, &diffusers::load(fixture(&case), &CPU)?)?;
    }
    Ok(())
}

#[test]
fn files_are_saved_unchanged() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    for case in ["new", "old", "processor"] {
        let folder = fixture(&format!("diffusers/{case}"));
        let weights = diffusers::load(&folder, &CPU)?;
        diffusers::save(dir.path(), &weights)?;
        let again = diffusers::load(dir.path().join(FILE), &CPU)?;
        assert_eq!(again.config(), weights.config());
        assert_same(&again.state_dict(), &weights.state_dict())?;
        let of_unet = |path: &Path| -> lora::Result<StateDict> {
            let all = tensors(path)?.into_iter();
            Ok(all.filter(|(name, _)| name.starts_with("unet.")).collect())
        };
        if case == "new" {
            assert_same(&of_unet(&dir.path().join(FILE))?, &of_unet(&folder.join(FILE))?)?;
        }
    }
    Ok(())
}

#[test]
fn metadata_has_rank_alpha_and_patterns() -> lora::Result<()> {
    let config = diffusers::load(fixture("diffusers/new"), &CPU)?.config();
    let own = |path: &str| (config.lora_config(path).r, config.lora_config(path).lora_alpha);
    assert_eq!(own("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"), (2, 7.));
    assert_eq!(own("unet.mid_block.attentions.0.proj_in"), (3, 4.5));
    assert_eq!(own("unet.up_blocks.1.resnets.0.conv_shortcut"), (3, 7.));
    Ok(())
}

#[test]
fn a_component_is_taken_out_and_put_back() -> lora::Result<()> {
    let weights = diffusers::load(fixture("diffusers/new"), &CPU)?;
    let (config, adapter) = (weights.config(), weights.state_dict());
    let unet = weights.component("unet")?;
    let path = "mid_block.attentions.0.proj_in";
    assert_eq!(unet.config().lora_config(path).lora_alpha, 4.5);
    let text = weights.component("text_encoder")?;
    assert_eq!(unet.state_dict().len() + text.state_dict().len(), adapter.len());
    let (unet, text) = (unet.in_component("unet"), text.in_component("text_encoder"));
    let mut all = unet.state_dict();
    all.extend(text.state_dict());
    assert_same(&all, &adapter)?;
    for path in config.layers.keys() {
        let own = if path.starts_with("unet.") { unet.config() } else { text.config() };
        assert_eq!(own.lora_config(path), config.lora_config(path));
        assert_eq!(own.kind(path), config.kind(path));
    }
    let error = weights.component("transformer").unwrap_err().to_string();
    assert!(error.contains("unet") && error.contains("text_encoder"), "{error}");
    Ok(())
}

/// A file with one layer and this metadata.
fn with_metadata(metadata: &str, extra: &str) -> lora::Result<String> {
    of_layer("unet.q", metadata, extra)
}

fn of_layer(layer: &str, metadata: &str, extra: &str) -> lora::Result<String> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("bad.safetensors");
    let key = |last: &str| format!("{layer}.{last}");
    let mut file = StateDict::new();
    file.insert(key("lora_A.weight"), zeros(&[2, 4])?);
    file.insert(key("lora_B.weight"), zeros(&[6, 2])?);
    if !extra.is_empty() {
        file.insert(extra.to_owned(), zeros(&[1])?);
    }
    let mut header = std::collections::HashMap::new();
    if !metadata.is_empty() {
        header.insert("lora_adapter_metadata".to_owned(), metadata.to_owned());
    }
    fs::write(&path, safetensors::serialize(&file, Some(header)).unwrap())?;
    Ok(match diffusers::load(&path, &CPU) {
        Ok(weights) => {
            let LoraConfig { r, lora_alpha, .. } = weights.config().lora;
            format!("loads with {r} {lora_alpha}")
        }
        error => failed("bad.safetensors", error),
    })
}

#[test]
fn what_changes_the_update_is_read_or_refused_by_name() -> lora::Result<()> {
    let cases = [
        ("", "", "loads with 2 2"),
        (r#"{"unet.r": 2, "unet.lora_alpha": 5}"#, "", "loads with 2 5"),
        (r#"{"r": 2, "lora_alpha": 5}"#, "", "loads with 2 5"),
        ("", "unet.q.alpha", "loads with 2 0"),
        (r#"{"unet.r": 3, "unet.lora_alpha": 5}"#, "", "rank 3"),
        (r#"{"unet.r": 2}"#, "", "lora_alpha"),
        (r#"{"unet.r": 2, "unet.lora_alpha": 5, "unet.use_dora": true}"#, "", "use_dora"),
        (r#"{"unet.r": 2, "unet.lora_alpha": 5, "unet.new": 1}"#, "", "new"),
        (r#"{"transformer.r": 2, "transformer.lora_alpha": 5}"#, "", "component"),
        (r#"{"unet.r": 2, "unet.lora_alpha": 5}"#, "unet.q.alpha", "alpha as a tensor"),
        ("[]", "", "PEFT"),
        ("", "unet.q.lora_magnitude_vector", "lora_magnitude_vector"),
        ("", "unet.q.lora_B.bias", "lora_B.bias"),
        ("", "unet.q.lora.down.weight", "same tensor"),
        ("", "unet.p.lora_A.weight", "unet.p.lora_A.weight"),
        ("", "unet.q.lora_A", "loralib"),
        ("", "unet.q.lora_A.default.weight", "name \"default\""),
        ("", "lora_unet_q.lora_down.weight", "kohya"),
    ];
    for (metadata, extra, expected) in cases {
        let result = with_metadata(metadata, extra)?;
        assert!(result.contains(expected), "{metadata} {extra}: {result}");
    }
    Ok(())
}

#[test]
fn a_layer_of_no_component_is_refused() -> lora::Result<()> {
    let bare = r#"{"r": 2, "lora_alpha": 5}"#;
    let cases = [
        ("base_model.model.q", "", "PEFT"),
        ("base_model.model.q", bare, "PEFT"),
        ("unet._orig_mod.q", "", "compiled"),
        ("_orig_mod.unet.q", bare, "compiled"),
        ("down_blocks.0.attentions.0.q", "", "component"),
        ("q", "", "component"),
        ("down_blocks.0.attentions.0.q", bare, "loads with 2 5"),
        ("transformer_2.q", "", "loads with 2 2"),
        ("diffusion_model.q", "", "loads with 2 2"),
        ("my_model.q", r#"{"my_model.r": 2, "my_model.lora_alpha": 5}"#, "loads with 2 5"),
    ];
    for (layer, metadata, expected) in cases {
        let result = of_layer(layer, metadata, "")?;
        assert!(result.contains(expected), "{layer} {metadata}: {result}");
    }
    Ok(())
}

/// What a text encoder alone has: transformers writes the name of its base, diffusers none of a U-Net's.
#[test]
fn components_differ_in_options_that_do_not_change_the_update() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("lora.safetensors");
    let tensors = StateDict::from([
        ("unet.q.lora_A.weight".to_owned(), zeros(&[2, 4])?),
        ("unet.q.lora_B.weight".to_owned(), zeros(&[6, 2])?),
    ]);
    let load = |text: &str| {
        let metadata = format!(
            r#"{{"unet.r": 2, "unet.lora_alpha": 5, "unet.use_rslora": true, "unet.lora_dropout": 0.5,
                "unet.task_type": "T", "text_encoder.r": 1, "text_encoder.lora_alpha": 1, {text}}}"#
        );
        let header = HashMap::from([("lora_adapter_metadata".to_owned(), metadata)]);
        fs::write(&path, safetensors::serialize(&tensors, Some(header)).unwrap())?;
        diffusers::load(&path, &CPU)
    };
    let harmless = r#""text_encoder.base_model_name_or_path": "a", "text_encoder.task_type": "T",
        "text_encoder.lora_dropout": 0.1, "text_encoder.use_rslora": "#;
    let config = load(&format!("{harmless} true"))?.config();
    let expected = LoraConfig { r: 2, lora_alpha: 5., rslora: true, ..Default::default() };
    assert_eq!(config.lora, expected);
    assert_eq!((config.base_model_name_or_path, config.task_type), (None, Some("T".to_owned())));
    let error = failed("lora.safetensors", load(&format!("{harmless} false")));
    assert!(error.contains("use_rslora") && error.contains("\"unet\""), "{error}");
    Ok(())
}

/// The oldest names of an attention with keys and values of a second input.
#[test]
fn added_projections_of_a_processor_are_those_of_its_attention() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("lora.safetensors");
    let tensors = StateDict::from([
        ("unet.a.processor.add_k_proj_lora.down.weight".to_owned(), zeros(&[2, 4])?),
        ("unet.a.processor.add_k_proj_lora.up.weight".to_owned(), zeros(&[6, 2])?),
    ]);
    crate::save(&path, &tensors)?;
    let adapter = diffusers::load(&path, &CPU)?.state_dict();
    assert_eq!(
        Vec::from_iter(adapter.keys()),
        ["unet.a.add_k_proj.lora_A", "unet.a.add_k_proj.lora_B"]
    );
    Ok(())
}

#[test]
fn rslora_is_in_the_metadata() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let cfg = LoraConfig { r: 2, lora_alpha: 5., rslora: true, ..Default::default() };
    let adapter = StateDict::from([
        ("transformer.q.lora_A".to_owned(), zeros(&[2, 4])?),
        ("transformer.q.lora_B".to_owned(), zeros(&[6, 2])?),
    ]);
    diffusers::save(dir.path(), &LoraWeights::new(cfg, adapter.clone())?)?;
    assert_eq!(diffusers::load(dir.path(), &CPU)?.config().lora, cfg);
    let bare = adapter.iter().map(|(k, t)| (k.replace("transformer.q", "q"), t.clone())).collect();
    let bare = LoraWeights::new(cfg, bare)?;
    assert!(failed(FILE, diffusers::save(dir.path(), &bare)).contains("component"));
    Ok(())
}

/// A 1-d convolution of rank r has the rank r/k, rounded up, in this crate.
#[test]
fn convolutions_of_all_dimensions_keep_their_update() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let folder = fixture("../peft/conv");
    let weights = peft::load(&folder, &CPU)?;
    let all = weights.in_component("transformer");
    diffusers::save(dir.path(), &all)?;
    let read = diffusers::load(dir.path(), &CPU)?;
    assert_same(&read.state_dict(), &all.state_dict())?;
    let read = read.component("transformer")?;
    assert_eq!(read.state_dict().len(), 6);
    let base = tensors(&folder.join("model.safetensors"))?.into_iter();
    let base = base.filter_map(|(k, t)| Some((k.strip_prefix("base.")?.to_owned(), t))).collect();
    let ours = merge_into(&base, &read)?;
    assert_same(&ours, &merge_into(&base, &weights)?)?;
    for path in ["conv1", "conv2", "conv3"] {
        assert!(
            difference(&ours[&format!("{path}.weight")], &base[&format!("{path}.weight")])? > 1e-3
        );
    }
    Ok(())
}

#[test]
fn an_adapter_of_a_component_gives_a_merged_base() -> lora::Result<()> {
    let unet = diffusers::load(fixture("diffusers/new"), &CPU)?.component("unet")?;
    let adapter = lora::Adapter::from_weights(&unet)?;
    let [base, merged] = model("diffusers/new")?;
    let of_unet = |all: StateDict| -> HashMap<_, _> {
        all.into_iter()
            .filter_map(|(k, t)| Some((k.strip_prefix("unet.")?.to_owned(), t)))
            .collect()
    };
    let vb = VarBuilder::from_tensors(of_unet(base), DType::F32, &CPU);
    let vb = adapter.merged(vb)?;
    for (name, expected) in of_unet(merged) {
        let apart = difference(&vb.get(expected.dims(), &name)?, &expected)?;
        assert!(apart <= 2e-6, "{name} {apart}");
    }
    let mut half = unet.state_dict();
    half.retain(|name, _| !name.ends_with("proj_in.lora_B"));
    let error = LoraWeights::new(unet.config(), half).unwrap_err().to_string();
    assert!(error.contains("proj_in.lora_B"), "{error}");
    Ok(())
}
