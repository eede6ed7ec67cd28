//! Adapters from PEFT's configuration: the layers, ranks and alphas that PEFT itself gives
//! (`fixtures/selection.py`), and options that are errors.

use crate::adapter::{base, vb, Model};
use candle_core::{DType, Device};
use lora::layers::LayerKind;
use loralib as lora;
use loralib::nn as candle_nn;
use loralib::{Adapter, Bias};
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const CPU: Device = Device::Cpu;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn selection() -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join("selection.json")).unwrap()).unwrap()
}

/// An adapter from the defaults with other options.
fn adapter(options: &Value) -> lora::Result<Adapter> {
    adapter_of(&options.to_string())
}

/// An adapter from the defaults with other options, an object's text, in which patterns keep their order.
fn adapter_of(options: &str) -> lora::Result<Adapter> {
    let mut defaults = selection()["defaults"].take();
    let given: Value = serde_json::from_str(options).unwrap();
    defaults.as_object_mut().unwrap().retain(|key, _| given.get(key).is_none());
    let json = defaults.to_string();
    let json =
        format!("{},{}", json.strip_suffix('}').unwrap(), options.strip_prefix('{').unwrap());
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("adapter_config.json"), json)?;
    Adapter::from_peft_config(dir.path())
}

/// The ranks and alphas of the adapted layers among linear ones at `paths`.
fn adapted(adapter: &Adapter, paths: &[&str]) -> lora::Result<BTreeMap<String, (usize, f64)>> {
    let vb = adapter.var_builder(candle_nn::VarBuilder::zeros(DType::F32, &CPU));
    for path in paths {
        candle_nn::linear_no_bias(4, 4, vb.pp(path))?;
    }
    let config = adapter.config();
    let factors = adapter.var_map().data().lock().unwrap();
    let layer = |path: String| {
        let own = config.lora_config(&path);
        assert_eq!(factors[&format!("{path}.lora_A")].dims(), [own.r, 4]);
        (path, (own.r, own.lora_alpha))
    };
    Ok(adapter.adapted().into_iter().map(layer).collect())
}

#[test]
fn a_configuration_adapts_the_layers_that_peft_adapts() -> lora::Result<()> {
    let selection = selection();
    let paths = selection["paths"].as_array().unwrap();
    let paths: Vec<_> = paths.iter().map(|path| path.as_str().unwrap()).collect();
    for case in selection["cases"].as_array().unwrap() {
        let adapted = adapted(&adapter_of(case["options"].as_str().unwrap())?, &paths)?;
        let expected = serde_json::from_value(case["adapted"].clone()).unwrap();
        assert_eq!(adapted, expected, "{}", case["options"]);
    }
    Ok(())
}

#[test]
fn a_configuration_gives_every_option() -> lora::Result<()> {
    let options = json!({
        "r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "use_rslora": true, "bias": "lora_only",
        "modules_to_save": ["head"], "target_modules": ["qkv", "up_proj"], "exclude_modules": ["2.up_proj"],
        "rank_pattern": {"qkv": 3}, "alpha_pattern": {"up_proj": 5}, "task_type": "CAUSAL_LM",
    });
    let adapter = adapter(&options)?;
    let _model = Model::new(adapter.var_builder(vb(&base())))?;
    adapter.check()?;
    assert_eq!(adapter.adapted(), ["layers.0.qkv", "layers.1.up_proj"]);
    assert_eq!(adapter.vars()?.len(), 2 * 2 + 1 + 2, "factors, a bias, the head");
    let config = adapter.config();
    assert_eq!((config.bias, config.task_type.as_deref()), (Bias::LoraOnly, Some("CAUSAL_LM")));
    let (qkv, up) = (config.lora_config("layers.0.qkv"), config.lora_config("layers.1.up_proj"));
    assert_eq!((qkv.lora_dropout, qkv.rslora), (0.25, true));
    assert_eq!((qkv.scaling(), up.scaling()), (6. / 3f64.sqrt(), 5. / 2.));
    Ok(())
}

#[test]
fn a_configuration_takes_the_kinds_of_fused_layers() -> lora::Result<()> {
    let fused = LayerKind::MergedLinear(vec![true, false, true]);
    let declared =
        adapter(&json!({ "r": 2, "target_modules": ["qkv"] }))?.with_layer("qkv", fused.clone());
    // Until PEFT 0.2 in the file itself.
    let given = json!({ "r": 2, "target_modules": ["qkv"], "enable_lora": [true, false, true] });
    for adapter in [declared, adapter(&given)?] {
        let _model = Model::new(adapter.var_builder(vb(&base())))?;
        adapter.check()?;
        assert_eq!(adapter.config().kind("layers.0.qkv"), Some(&fused));
        let vars = adapter.named_vars()?;
        assert_eq!(vars["layers.0.qkv.lora_A"].dims(), [4, 8]);
        assert_eq!(vars["layers.0.qkv.lora_B"].dims(), [16, 2]);
    }
    Ok(())
}

#[test]
fn an_adapter_from_a_configuration_is_fresh_and_saves() -> lora::Result<()> {
    let (base, dir) = (base(), tempfile::tempdir()?);
    let options = json!({ "target_modules": "all-linear", "exclude_modules": ["head"],
                          "rank_pattern": {"qkv": 3}, "alpha_pattern": {"up_proj": 5} });
    let adapter = adapter(&options)?.seed(1);
    let model = Model::new(adapter.var_builder(vb(&base)))?;
    adapter.check()?;
    let ids = candle_core::Tensor::new(&[[1u32, 2, 3]], &CPU)?;
    let plain = Model::new(vb(&base))?.forward(&ids)?;
    let apart = crate::common::difference(&model.forward(&ids)?, &plain)?;
    assert!(apart < 1e-6, "a new adapter changes nothing: {apart}");
    for var in adapter.vars()? {
        var.set(&crate::common::randn(var.shape(), var.dtype(), &CPU)?)?;
    }
    adapter.eval()?;
    let expected = model.forward(&ids)?;
    adapter.save_pretrained(dir.path())?;
    let loaded = Adapter::load(dir.path(), &CPU)?;
    assert_eq!(loaded.config().lora_config("layers.0.qkv").r, 3);
    let served = Model::new(loaded.merged(vb(&base))?)?;
    assert!(crate::common::difference(&served.forward(&ids)?, &expected)? < 1e-5);
    // What was saved is a configuration too, of the same layers.
    let again = Adapter::from_peft_config(dir.path().join("adapter_config.json"))?;
    let _model = Model::new(again.var_builder(vb(&base)))?;
    again.check()?;
    assert_eq!(again.adapted(), adapter.adapted());
    for path in adapter.adapted() {
        assert_eq!(
            again.config().lora_config(&path),
            adapter.config().lora_config(&path),
            "{path}"
        );
    }
    Ok(())
}

/// N(0, 1/r²), whatever the number of inputs.
#[test]
fn a_gaussian_initialisation_has_peft_s_variance() -> lora::Result<()> {
    for r in [2, 8] {
        let options = json!({ "r": r, "target_modules": ["q"], "init_lora_weights": "gaussian" });
        let adapter = adapter(&options)?.seed(3);
        let vb = adapter.var_builder(candle_nn::VarBuilder::zeros(DType::F32, &CPU));
        candle_nn::linear_no_bias(4000, 3, vb.pp("q"))?;
        let (a, b) = (&adapter.named_vars()?["q.lora_A"], &adapter.named_vars()?["q.lora_B"]);
        let mean = |t: &candle_core::Tensor| t.mean_all()?.to_scalar::<f32>();
        let (first, second) = (mean(a)?, mean(&a.sqr()?)?);
        assert!((first * r as f32).abs() < 0.05, "{first}");
        // The standard error is 1/r² · √(2 / 4000r).
        assert!((second * (r * r) as f32 - 1.).abs() < 0.06, "{second}");
        assert_eq!(mean(&b.abs()?)?, 0.);
    }
    Ok(())
}

#[test]
fn options_that_a_new_adapter_cannot_have_are_named() {
    let targets = json!(["q"]);
    let options = [
        ("init_lora_weights", json!("orthogonal")),
        ("init_lora_weights", json!(false)),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("pissa_niter_")),
        ("use_dora", json!("yes")),
        ("lora_dropout", json!(1.0)),
        ("velora_config", json!({ "num_groups": 2 })),
        ("layer_replication", json!([[0, 2]])),
        ("peft_type", json!("LOHA")),
        ("target_modules", json!(null)),
        ("target_modules", json!(3)),
        ("target_modules", json!("(q")),
        ("exclude_modules", json!("(q")),
        ("layers_to_transform", json!([-1])),
        ("layers_to_transform", json!("1")),
        ("layers_pattern", json!(["h"])),
        ("rank_pattern", json!({ "(q": 2 })),
    ];
    for (key, value) in options {
        let mut all = json!({ "target_modules": targets });
        all[key] = value;
        let error = adapter(&all).unwrap_err().to_string();
        let named = error.contains(key) || error.contains("(q");
        assert!(named && error.contains("adapter_config.json"), "{key}: {error}");
    }
    // PEFT refuses these of a string, which may already name layers.
    for (key, value) in [("layers_to_transform", json!([1])), ("layers_pattern", json!("h"))] {
        let error = adapter(&json!({ "target_modules": "all-linear", key: value })).unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
    }
    let missing = Adapter::from_peft_config("nowhere/adapter_config.json").unwrap_err();
    assert!(missing.to_string().contains("nowhere"), "{missing}");
}
