//! Adapters that cannot be loaded or saved are errors that name the option or tensor.

use crate::kinds::{sample, Sample};
use crate::{folder, CPU};
use candle_core::{DType, Tensor};
use lora::adapter::AdapterConfig;
use lora::formats::peft;
use lora::layers::LayerKind;
use lora::utils::StateDict;
use lora::LoraWeights;
use loralib as lora;
use std::collections::HashMap;

fn refused(change: impl Fn(&mut serde_json::Value), tensors: impl Fn(&mut StateDict)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let source = folder("linear");
    let json = std::fs::read(source.join("adapter_config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    change(&mut json);
    std::fs::write(dir.path().join("adapter_config.json"), json.to_string()).unwrap();
    let file = source.join("adapter_model.safetensors");
    let mut all = lora::read_state_dict(file, &CPU).unwrap().tensors;
    tensors(&mut all);
    let path = dir.path().join("adapter_model.safetensors");
    candle_core::safetensors::save(&all.into_iter().collect::<HashMap<_, _>>(), path).unwrap();
    match peft::load(dir.path(), &CPU) {
        Ok(_) => "loaded".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn options_that_change_the_update_are_refused() {
    let options = [
        ("use_dora", 1.into()),
        ("init_lora_weights", "pissa".into()),
        ("init_lora_weights", "olora".into()),
        ("use_qalora", true.into()),
        ("layer_replication", serde_json::json!([[0, 2]])),
        ("enable_lora", serde_json::json!([1, 0])),
        ("trainable_token_indices", serde_json::json!(["one"])),
        ("lora_bias", 1.into()),
        ("target_parameters", "experts.down_proj".into()),
        ("not_known_yet", 1.into()),
        ("peft_type", "LOHA".into()),
        ("rank_pattern", serde_json::json!({"(q": 3})),
        ("r", 0.into()),
        ("lora_dropout", 1.5.into()),
    ];
    for (key, value) in options {
        let error = refused(|json| json[key] = value.clone(), |_| {});
        assert!(error.contains(key) && error.contains("adapter_config.json"), "{key}: {error}");
    }
    for (key, value) in [
        ("lora_dropout", serde_json::json!(1.0)),
        ("merge_weights", true.into()),
        ("enable_lora", serde_json::json!(null)),
        ("ensure_weight_tying", true.into()),
        ("init_lora_weights", "mica".into()),
        ("velora_config", serde_json::json!({"num_groups": 2})),
        ("target_parameters", serde_json::json!(["experts.down_proj"])),
    ] {
        assert_eq!(refused(|json| json[key] = value.clone(), |_| {}), "loaded", "{key}");
    }
    for value in [serde_json::json!(null), false.into(), "".into(), serde_json::json!({})] {
        assert_eq!(refused(|json| json["not_known_yet"] = value.clone(), |_| {}), "loaded");
    }
}

#[test]
fn an_initialisation_that_changed_the_base_is_refused_with_the_way_out() {
    for how in ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"] {
        let error = refused(|json| json["init_lora_weights"] = how.into(), |_| {});
        assert!(error.contains(how) && error.contains("init_lora_weights to true"), "{error}");
        let converts = error.contains("path_initial_model_for_weight_conversion");
        assert_eq!(converts, how != "loftq", "{error}");
    }
    // What a conversion leaves in the configuration.
    for key in ["corda_config", "lora_ga_config", "loftq_config", "eva_config"] {
        let options = serde_json::json!({"direction": "ArB2r"});
        assert_eq!(refused(|json| json[key] = options.clone(), |_| {}), "loaded", "{key}");
    }
}

#[test]
fn tensors_of_options_that_do_not_fit_are_refused() {
    let b_bias = "base_model.model.layers.0.q.lora_B.bias";
    let rows = "base_model.model.embed.token_adapter.trainable_tokens_delta";
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &CPU).unwrap();
    let with = |key: &str, dims: &[usize], option: &str, value: serde_json::Value| {
        let tensors = |all: &mut StateDict| drop(all.insert(key.to_owned(), zeros(dims)));
        refused(|json| json[option] = value.clone(), tensors)
    };
    let null = || serde_json::json!(null);
    assert!(with(b_bias, &[8], "lora_bias", null()).contains(b_bias));
    // The other layers lack theirs.
    assert!(with(b_bias, &[8], "lora_bias", true.into()).contains("lora_B.bias"));
    let option = "trainable_token_indices";
    assert!(with(rows, &[2, 6], option, null()).contains(rows));
    assert!(with(rows, &[2, 6], option, serde_json::json!([1])).contains(rows));
    assert!(with(rows, &[2, 6], option, serde_json::json!({"wte": [1, 2]})).contains(rows));
    assert_eq!(with(rows, &[2, 6], option, serde_json::json!({"embed": [1, 2]})), "loaded");
    assert!(refused(|json| json[option] = serde_json::json!([1]), |_| {}).contains(option));
    // Two wrappers and one name.
    let a = "base_model.model.layers.0.q.base_layer.lora_A.weight";
    let error = with(a, &[3, 6], "target_parameters", serde_json::json!(["q.weight"]));
    assert!(error.contains("layers.0.q") && error.contains("target_parameters"), "{error}");
    let deep = format!("base_model.model.q{}.lora_A.weight", ".base_layer".repeat(5000));
    let error = with(&deep, &[3, 6], "target_parameters", null());
    assert!(error.contains("target_parameters"), "{error}");
}

/// As a model's `state_dict()` and compiled models have them.
#[test]
fn names_of_wrapped_models_are_refused_with_the_way_out() {
    let all = |rename: &dyn Fn(&str) -> String| {
        let tensors = |all: &mut StateDict| {
            *all = all.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect();
        };
        refused(|_| {}, tensors)
    };
    let named = all(&|name| name.replace(".weight", ".default.weight"));
    let key = "base_model.model.layers.0.o.lora_A.default.weight";
    assert!(named.contains(key) && named.contains("save_pretrained"), "{named}");
    for prefix in ["_orig_mod.", "module."] {
        let wrapped = all(&|name| format!("{prefix}{name}"));
        let key = format!("{prefix}base_model.model.layers.0.o.lora_A.weight");
        assert!(
            wrapped.contains(&key) && wrapped.contains(&format!("remove {prefix:?}")),
            "{wrapped}"
        );
    }
    let inside = all(&|name| name.replace("base_model.model.", "base_model.model._orig_mod."));
    assert_eq!(inside, "loaded");
}

#[test]
fn a_byte_order_mark_is_passed_over() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(folder("linear").join(file), dir.path().join(file))?;
    }
    let path = dir.path().join("adapter_config.json");
    std::fs::write(&path, [b"\xef\xbb\xbf", &std::fs::read(&path)?[..]].concat())?;
    assert_eq!(
        peft::load(dir.path(), &CPU)?.config(),
        peft::load(folder("linear"), &CPU)?.config()
    );
    Ok(())
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let a = "base_model.model.layers.0.q.lora_A.weight";
    let b = "base_model.model.layers.0.q.lora_B.weight";
    let error = |change: &dyn Fn(&mut StateDict)| refused(|_| {}, change);
    assert_eq!(error(&|_| {}), "loaded");
    let renamed = |to: &'static str| {
        error(&move |all| {
            let tensor = all.remove(a).unwrap();
            all.insert(to.to_owned(), tensor);
        })
    };
    assert!(error(&|all| drop(all.remove(a))).contains(a));
    assert!(error(&|all| drop(all.remove(b))).contains(b));
    for to in ["x", "model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_A.x.weight"]
    {
        assert!(renamed(to).contains(to), "{}", renamed(to));
    }
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &CPU).unwrap();
    for dims in [&[2, 6][..], &[3], &[3, 6, 1]] {
        let error = error(&|all| drop(all.insert(a.to_owned(), zeros(dims))));
        assert!(error.contains("layers.0.q.lora_A"), "{error}");
    }
    let wrong = error(&|all| drop(all.insert(b.to_owned(), zeros(&[8, 2]))));
    assert!(wrong.contains("layers.0.q.lora_A") && wrong.contains("[8, 2]"), "{wrong}");
    let extra = "layers.0.q.lora_magnitude_vector";
    for end in ["", ".weight"] {
        let key = format!("base_model.model.{extra}{end}");
        let error = error(&|all| drop(all.insert(key.clone(), zeros(&[8]))));
        assert!(error.contains(extra) && error.contains("use_dora"), "{error}");
    }
    assert!(error(&|all| all.clear()).contains("adapter_model.safetensors"));
    let bias = "base_model.model.head.bias";
    assert!(error(&|all| drop(all.insert(bias.to_owned(), zeros(&[3])))).contains(bias));
}

#[test]
fn adapters_that_do_not_fit_are_not_saved() -> lora::Result<()> {
    let Sample { adapter, config, .. } = sample(false)?;
    let dir = tempfile::tempdir()?;
    let refused = |adapter: &StateDict, config: &AdapterConfig| {
        let weights = LoraWeights::new(config, adapter.clone());
        weights.and_then(|weights| peft::save(dir.path(), &weights)).unwrap_err().to_string()
    };
    let mut alone = adapter.clone();
    alone.remove("h.q.lora_B");
    assert!(refused(&alone, &config).contains("h.q.lora_B"));
    let unused = config.clone().with_layer("nowhere", LayerKind::Linear);
    assert!(refused(&adapter, &unused).contains("nowhere"));
    let with = |name: &str, dims: &[usize]| -> lora::Result<StateDict> {
        let mut with = adapter.clone();
        with.insert(name.into(), Tensor::zeros(dims, DType::F32, &CPU)?);
        Ok(with)
    };
    let bias = with("h.q.lora_bias", &[6])?;
    assert!(
        refused(&bias, &config).contains("lora_bias") && !refused(&bias, &config).contains("h.q")
    );
    let mut rows = config.clone();
    rows.trainable_token_indices.insert("table".to_owned(), vec![1, 2]);
    assert!(refused(&adapter, &rows).contains("table.trainable_tokens"));
    assert!(refused(&with("table.trainable_tokens", &[3, 4])?, &rows).contains("[3, 4]"));
    assert!(refused(&with("table.trainable_tokens", &[2, 4])?, &config).contains("table."));
    let wrong = config.clone().with_layer("h.q", LayerKind::Parameter { index: 0 });
    assert!(refused(&adapter, &wrong).contains("h.q.lora_A"));
    let mut undeclared = config.clone();
    undeclared.layers.remove("qkv");
    assert!(refused(&adapter, &undeclared).contains("h.qkv.lora_A"));
    let mut head = adapter.clone();
    head.insert("head.weight".into(), Tensor::zeros(2, DType::F32, &CPU)?);
    assert!(refused(&head, &config).contains("head.weight"));
    let head = StateDict::from([("head.weight".into(), Tensor::zeros(2, DType::F32, &CPU)?)]);
    let alone = AdapterConfig::default().with_trainable(lora::Bias::None.and("head"))?;
    assert!(refused(&head, &alone).contains("no layers"));
    assert!(refused(&StateDict::new(), &AdapterConfig::default()).contains("no layers"));
    let mut peft = adapter.clone();
    peft.insert(
        "base_model.model.q.lora_A.weight".into(),
        Tensor::zeros((2, 2), DType::F32, &CPU)?,
    );
    assert!(refused(&peft, &config).contains("PEFT's format"));
    for lora in [
        lora::LoraConfig { lora_alpha: f64::NAN, ..config.lora },
        lora::LoraConfig { lora_dropout: 1., ..config.lora },
    ] {
        let refused = refused(&adapter, &AdapterConfig { lora, ..config.clone() });
        assert!(refused.contains("lora_A"), "{refused}");
    }
    assert!(AdapterConfig::default()
        .with_trainable(lora::utils::Trainable::all_parameters())
        .is_err());
    assert!(dir.path().read_dir()?.next().is_none());
    Ok(())
}

/// Programs without `use_rslora` have no such tensors either, and one rank does not fit the experts' factors.
#[test]
fn plain_folders_have_the_factors_of_layers_alone() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    for (case, name) in [
        ("lora_bias", "lora_bias"),
        ("tokens", "trainable_tokens"),
        ("parameters", "experts"),
        ("dora", "lora_magnitude_vector"),
    ] {
        let weights = peft::load(folder(case), &CPU)?;
        let error = peft::save_plain(dir.path(), &weights).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("merge"), "{case}: {error}");
    }
    assert!(dir.path().read_dir()?.next().is_none());
    Ok(())
}
