//! kohya's files.

use crate::{assert_merged, assert_same, failed, fixture, save, tensors, zeros, CPU};
use candle_core::{DType, Tensor};
use lora::adapter::AdapterConfig;
use lora::formats::kohya;
use lora::layers::LayerKind;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;
use std::fs;
use std::path::Path;

fn names() -> lora::Result<Vec<String>> {
    let text = fs::read_to_string(fixture("kohya/names.txt"))?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn load(path: &Path, names: &[impl AsRef<str>]) -> lora::Result<LoraWeights> {
    kohya::with_paths(&kohya::load(path, &CPU)?, names)
}

#[test]
fn merged_weights_agree_with_diffusers_and_the_formula() -> lora::Result<()> {
    for case in ["kohya/attention", "kohya/conv"] {
        let adapter = load(&fixture(case).join("lora.safetensors"), &names()?)?;
        assert_merged(case, &adapter)?;
    }
    Ok(())
}

#[test]
fn files_are_saved_unchanged() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    for case in ["kohya/attention", "kohya/conv"] {
        let path = fixture(case).join("lora.safetensors");
        let weights = load(&path, &names()?)?;
        let again = dir.path().join("again.safetensors");
        kohya::save(&again, &weights)?;
        let (mut ours, mut theirs) = (tensors(&again)?, tensors(&path)?);
        // A missing alpha and 0 mean r. `attention` is diffusers', which writes lora_te1 for any text encoder.
        let alphas = |all: &mut StateDict| -> lora::Result<()> {
            for (name, tensor) in std::mem::take(all) {
                let by_diffusers = case == "kohya/attention";
                let name = if by_diffusers { name.replace("lora_te1_", "lora_te_") } else { name };
                // The fixtures' text encoder is transformers 5's.
                let name = name.replace("te_encoder_layers", "te_text_model_encoder_layers");
                let zero = name.ends_with("alpha") && tensor.to_scalar::<f32>()? == 0.;
                let tensor = if zero { Tensor::new(3f32, &CPU)? } else { tensor };
                if let Some(layer) = name.strip_suffix(".lora_down.weight") {
                    let r = Tensor::new(tensor.dim(0)? as f32, &CPU)?;
                    all.entry(format!("{layer}.alpha")).or_insert(r);
                }
                all.insert(name, tensor);
            }
            Ok(())
        };
        alphas(&mut ours)?;
        alphas(&mut theirs)?;
        assert_same(&ours, &theirs)?;
        assert_eq!(load(&again, &names()?)?.config(), weights.config());
    }
    Ok(())
}

#[test]
fn names_are_resolved_against_the_base_or_refused_with_candidates() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("some.safetensors");
    let pair = |flat: &str| -> lora::Result<StateDict> {
        Ok(StateDict::from([
            (format!("{flat}.lora_down.weight"), zeros(&[2, 4])?),
            (format!("{flat}.lora_up.weight"), zeros(&[6, 2])?),
        ]))
    };
    save(&path, &pair("lora_unet_a_b_c")?)?;
    let weights = kohya::load(&path, &CPU)?;
    let adapter = |names: &[&str]| Ok(kohya::with_paths(&weights, names)?.state_dict());
    let failed =
        |names: &[&str]| adapter(names).map_err(|e: lora::Error| e.to_string()).unwrap_err();
    let tensors = adapter(&["unet.a.b_c.weight", "text_encoder.a.b.c.weight"])?;
    assert_eq!(Vec::from_iter(tensors.keys()), ["unet.a.b_c.lora_A", "unet.a.b_c.lora_B"]);
    assert!(adapter(&["transformer.a_b.c.weight"])?.contains_key("transformer.a_b.c.lora_A"));
    let error = failed(&["unet.a.b_c.weight", "unet.a_b.c.weight"]);
    assert!(error.contains("unet.a.b_c") && error.contains("unet.a_b.c"), "{error}");
    let error = failed(&["unet.a.b.d.weight", "unet.x.weight"]);
    assert!(error.contains("lora_unet_a_b_c") && error.contains("lora_unet_a_b_d"), "{error}");
    Ok(())
}

/// Adapters of one model each, and the names that sd-scripts (networks/lora.py, lora_flux.py, lora_sd3.py) and, for
/// diffusers' layers of a transformer, OneTrainer have for their layers.
#[test]
fn layers_have_the_names_of_the_programs_for_their_model() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("some.safetensors");
    let clip = "text_encoder.text_model.encoder.layers.0.mlp.fc1";
    let big_clip = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1";
    let models: [&[(&str, &str)]; 12] = [
        &[(clip, "lora_te_text_model_encoder_layers_0_mlp_fc1")],
        &[
            (
                "text_encoder.encoder.layers.0.mlp.fc1",
                "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            ),
            (
                "text_encoder_2.encoder.layers.0.mlp.fc1",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            ),
        ],
        &[
            (
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
                "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
            ),
            (clip, "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ],
        &[
            (
                "unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q",
                "lora_unet_mid_block_attentions_0_transformer_blocks_1_attn1_to_q",
            ),
            (clip, "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ],
        &[
            (
                "unet.model.diffusion_model.input_blocks.4.1.proj_in",
                "lora_unet_input_blocks_4_1_proj_in",
            ),
            (clip, "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            (big_clip, "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        ],
        &[
            ("transformer.double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv"),
            (clip, "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            (
                "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            ),
        ],
        &[
            (
                "transformer.transformer_blocks.0.attn.to_q",
                "lora_transformer_transformer_blocks_0_attn_to_q",
            ),
            ("transformer.x_embedder", "lora_transformer_x_embedder"),
            (clip, "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ],
        &[
            (
                "transformer.joint_blocks.0.x_block.attn.qkv",
                "lora_unet_joint_blocks_0_x_block_attn_qkv",
            ),
            (big_clip, "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
            (
                "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            ),
        ],
        &[("diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_0_self_attn_q")],
        // Text encoders in the single files of Stable Diffusion 1, SDXL and 3.
        &[
            (
                "unet.model.diffusion_model.input_blocks.4.1.proj_in",
                "lora_unet_input_blocks_4_1_proj_in",
            ),
            (
                "text_encoder.cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1",
                "lora_te_text_model_encoder_layers_0_mlp_fc1",
            ),
        ],
        &[(
            "text_encoder.conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        )],
        &[
            (
                "text_encoder.text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
                "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            ),
            (
                "text_encoder_2.text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            ),
            (
                "text_encoder_3.text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            ),
        ],
    ];
    let cfg = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    for layers in models {
        let mut adapter = StateDict::new();
        for (layer, _) in layers {
            adapter.insert(format!("{layer}.lora_A"), zeros(&[2, 4])?);
            adapter.insert(format!("{layer}.lora_B"), zeros(&[6, 2])?);
        }
        kohya::save(&path, &LoraWeights::new(cfg, adapter.clone())?)?;
        let file = tensors(&path)?;
        assert_eq!(file.len(), 3 * layers.len());
        for (_, name) in layers {
            assert!(file.contains_key(&format!("{name}.alpha")), "{name}: {:?}", file.keys());
        }
        let names: Vec<_> = layers.iter().map(|(layer, _)| format!("{layer}.weight")).collect();
        assert_same(&load(&path, &names)?.state_dict(), &adapter)?;
    }
    Ok(())
}

#[test]
fn a_base_in_another_layout_is_told() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("some.safetensors");
    let cfg = LoraConfig { r: 2, ..Default::default() };
    let failed = |names: &[&str]| load(&path, names).unwrap_err().to_string();
    for (layer, original) in [
        ("unet.model.diffusion_model.input_blocks.4.1.proj_in", "input_blocks"),
        ("transformer.double_blocks.0.img_attn.qkv", "double_blocks"),
    ] {
        let adapter = StateDict::from([
            (format!("{layer}.lora_A"), zeros(&[2, 4])?),
            (format!("{layer}.lora_B"), zeros(&[6, 2])?),
        ]);
        kohya::save(&path, &LoraWeights::new(cfg, adapter)?)?;
        let diffusers =
            ["unet.down_blocks.1.attentions.0.proj_in.weight", "transformer.x_embedder.weight"];
        let error = failed(&diffusers);
        assert!(error.contains("original release") && error.contains(original), "{error}");
        let other = layer.replace(['0', '4'], "1") + ".weight";
        let error = failed(&[&other]);
        assert!(error.contains("nearest"), "{error}");
    }
    let clip = "text_encoder.text_model.encoder.layers.0.mlp.fc1";
    let adapter = StateDict::from([
        (format!("{clip}.lora_A"), zeros(&[2, 4])?),
        (format!("{clip}.lora_B"), zeros(&[6, 2])?),
    ]);
    kohya::save(&path, &LoraWeights::new(cfg, adapter)?)?;
    let open_clip = ["text_encoder.cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight"];
    let error = failed(&open_clip);
    assert!(error.contains("OpenCLIP"), "{error}");
    Ok(())
}

#[test]
fn other_methods_and_broken_pairs_are_refused_by_name() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("bad.safetensors");
    let layer = "lora_unet_mid_block_attentions_0_proj_in";
    let good = [("lora_down.weight", [2, 8]), ("lora_up.weight", [8, 2])];
    for last in ["lokr_w1", "hada_w1_a", "lora_mid.weight", "dora_scale", "diff", "lora_A.weight"] {
        let mut file = StateDict::from([(format!("{layer}.{last}"), zeros(&[2, 2])?)]);
        for (last, shape) in good {
            file.insert(format!("{layer}.{last}"), zeros(&shape)?);
        }
        save(&path, &file)?;
        let error = failed("bad.safetensors", kohya::load(&path, &CPU));
        assert!(error.contains(last), "{error}");
    }
    for missing in 0..2 {
        let (last, shape) = good[1 - missing];
        save(&path, &StateDict::from([(format!("{layer}.{last}"), zeros(&shape)?)]))?;
        let error = failed("bad.safetensors", kohya::load(&path, &CPU));
        assert!(error.contains(layer), "{error}");
    }
    Ok(())
}

#[test]
fn scalings_are_kept_and_what_has_no_place_is_refused() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("out.safetensors");
    let names = ["text_encoder.q.weight", "text_encoder_2.q.weight"];
    let mut adapter = StateDict::new();
    for component in ["text_encoder", "text_encoder_2"] {
        adapter.insert(format!("{component}.q.lora_A"), zeros(&[3, 4])?);
        adapter.insert(format!("{component}.q.lora_B"), zeros(&[6, 3])?);
    }
    for (lora_alpha, rslora) in [(7., false), (1. / 3., false), (16., true), (-2., false)] {
        let cfg = LoraConfig { r: 3, lora_alpha, rslora, ..Default::default() };
        kohya::save(&path, &LoraWeights::new(cfg, adapter.clone())?)?;
        let file = tensors(&path)?;
        assert!(file.contains_key("lora_te1_q.alpha") && file.contains_key("lora_te2_q.alpha"));
        let config = load(&path, &names)?.config();
        assert!((config.lora.scaling() - cfg.scaling()).abs() < 1e-15, "{config:?}");
    }
    let before = fs::read(&path)?;
    let cfg = LoraConfig { r: 3, lora_alpha: 3., ..Default::default() };
    let failing = |tensors: &StateDict, config: AdapterConfig, named: &str| {
        let weights = LoraWeights::new(config, tensors.clone()).unwrap();
        let error = failed("out.safetensors", kohya::save(&path, &weights));
        assert!(error.contains(named), "{error}");
        assert_eq!(fs::read(&path).unwrap(), before, "the old file is there");
    };
    let refused = |name: &str| {
        let part = [(name.to_owned(), adapter["text_encoder.q.lora_A"].clone())];
        LoraWeights::new(cfg, part.into()).unwrap_err().to_string()
    };
    failing(&adapter, LoraConfig { lora_alpha: 0., ..cfg }.into(), "alpha is 0");
    failing(&adapter, LoraConfig { fan_in_fan_out: true, ..cfg }.into(), "fan_in_fan_out");
    assert!(refused("text_encoder.q.lora_A").contains("lora_B"));
    assert!(refused("text_encoder.q.bias").contains("q.bias"));
    let table = AdapterConfig::from(cfg).with_layer("q", LayerKind::Embedding);
    failing(&adapter, table, "Embedding");
    let bare = adapter.iter().take(2).map(|(k, t)| (k.replace("text_encoder.", ""), t.clone()));
    failing(&bare.collect(), cfg.into(), "component");
    let mut twice = StateDict::new();
    for path in ["unet.a.b", "unet.a_b"] {
        twice.insert(format!("{path}.lora_A"), adapter["text_encoder.q.lora_A"].clone());
        twice.insert(format!("{path}.lora_B"), adapter["text_encoder.q.lora_B"].clone());
    }
    failing(&twice, cfg.into(), "lora_unet_a_b");
    Ok(())
}

/// sd-scripts saves in half precision as a rule.
#[test]
fn half_precision_keeps_its_bits() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let (path, again) = (dir.path().join("a.safetensors"), dir.path().join("b.safetensors"));
    let source = tensors(&fixture("kohya/attention/lora.safetensors"))?;
    for dtype in [DType::F16, DType::BF16] {
        let half = |(k, t): (&String, &Tensor)| Ok((k.clone(), t.to_dtype(dtype)?));
        save(&path, &source.iter().map(half).collect::<lora::Result<_>>()?)?;
        let weights = load(&path, &names()?)?;
        let adapter = weights.state_dict();
        assert!(adapter.values().all(|t| t.dtype() == dtype));
        kohya::save(&again, &weights)?;
        assert_same(&adapter, &load(&again, &names()?)?.state_dict())?;
    }
    Ok(())
}
