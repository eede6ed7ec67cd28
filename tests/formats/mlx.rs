//! MLX's folders.

use crate::common::bits;
use crate::{assert_merged, assert_same, failed, fixture, save, tensors, zeros, CPU};
use candle_core::DType;
use lora::adapter::{AdapterConfig, LayerConfig};
use lora::formats::mlx;
use lora::layers::LayerKind;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;
use std::fs;

#[test]
fn merged_weights_agree_with_the_formula() -> lora::Result<()> {
    let adapter = mlx::load(fixture("mlx"), &CPU)?;
    assert_eq!(adapter.config().lora.scaling(), 20.);
    assert_eq!(adapter.config().lora.lora_dropout, 0.05);
    assert_merged("mlx", &adapter)
}

#[test]
fn folders_are_saved_unchanged() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let weights = mlx::load(fixture("mlx"), &CPU)?;
    mlx::save(dir.path(), &weights)?;
    let again = mlx::load(dir.path(), &CPU)?;
    assert_eq!(again.config(), weights.config());
    let file = "adapters.safetensors";
    assert_same(&tensors(&dir.path().join(file))?, &tensors(&fixture("mlx").join(file))?)?;
    let text = fs::read_to_string(dir.path().join("adapter_config.json"))?;
    assert!(text.contains(r#""scale": 20.0"#) && text.contains(r#""rank": 3"#), "{text}");
    Ok(())
}

/// As some editors and programs write it.
#[test]
fn a_byte_order_mark_and_null_for_the_default_are_read() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = "adapters.safetensors";
    fs::copy(fixture("mlx").join(file), dir.path().join(file))?;
    let text = fs::read_to_string(fixture("mlx/adapter_config.json"))?;
    let text = text.replace(r#""fine_tune_type": "lora""#, r#""fine_tune_type": null"#);
    assert!(text.contains("null"));
    fs::write(dir.path().join("adapter_config.json"), format!("\u{feff}{text}"))?;
    let [read, expected] = [mlx::load(dir.path(), &CPU)?, mlx::load(fixture("mlx"), &CPU)?];
    assert_eq!(read.config(), expected.config());
    Ok(())
}

#[test]
fn ranks_and_scalings_become_common() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let ones = |shape: &[usize]| Ok::<_, lora::Error>(zeros(shape)?.ones_like()?);
    let (mut adapter, mut base) = (StateDict::new(), StateDict::new());
    for (path, r) in [("a", 2), ("b", 2), ("c", 4), ("d", 2)] {
        adapter.insert(format!("{path}.lora_A"), ones(&[r, 3])?);
        adapter.insert(format!("{path}.lora_B"), ones(&[5, r])?);
        base.insert(format!("{path}.weight"), zeros(&[5, 3])?);
    }
    let lora = LoraConfig { r: 2, lora_alpha: 6., ..Default::default() };
    let mut config = AdapterConfig::from(lora);
    let own = |r, lora_alpha| LayerConfig { r, lora_alpha, ..Default::default() };
    config.layers.insert("c".to_owned(), own(Some(4), Some(4.)));
    config.layers.insert("d".to_owned(), own(None, Some(12.)));
    let weights = LoraWeights::new(config, adapter.clone())?;
    mlx::save(dir.path(), &weights)?;
    let again = mlx::load(dir.path(), &CPU)?;
    let read = again.config();
    assert_eq!((read.lora.r, read.lora.scaling()), (4, 3.));
    for (name, merged) in merge_into(&base, &again)? {
        let before = &merge_into(&base, &weights)?[&name];
        let apart = crate::common::difference(&merged, before)?;
        assert!(apart <= 2e-6, "{name} {apart}");
    }
    let twice = (again.state_dict()["d.lora_B"].narrow(1, 0, 2)? / 2.)?;
    assert_eq!(bits(&twice)?, bits(&adapter["d.lora_B"])?, "a power of two is exact");
    Ok(())
}

#[test]
fn what_mlx_means_otherwise_is_refused_by_name() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapters.safetensors");
    let parameters = r#""rank": 2, "scale": 3, "dropout": 0"#;
    let good = format!(r#"{{"lora_parameters": {{{parameters}}}}}"#);
    let pair = |key: &str| -> lora::Result<StateDict> {
        Ok([
            ("q.lora_a".to_owned(), zeros(&[3, 2])?),
            ("q.lora_b".to_owned(), zeros(&[2, 5])?),
            (key.to_owned(), zeros(&[2, 2])?),
        ]
        .into())
    };
    let cases = [
        (good.as_str(), "q.m", "q.m"),
        (&good, "p.lora_a", "p.lora_a"),
        (&good, "q.lora_A", "q.lora_A"),
        (r#"{"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 3}}"#, "", "dora"),
        (r#"{"lora_parameters": {"rank": 2, "scale": 3, "alpha": 8}}"#, "", "alpha"),
        (r#"{"lora_parameters": {"rank": 4, "scale": 3}}"#, "", "rank is 2"),
        (r#"{"lora_parameters": {"rank": 2}}"#, "", "scale"),
        (r#"{"peft_type": "LORA"}"#, "", "lora_parameters"),
    ];
    for (config, key, named) in cases {
        fs::write(dir.path().join("adapter_config.json"), config)?;
        let mut file = pair(key)?;
        file.remove("");
        save(&path, &file)?;
        let error = failed("adapter", mlx::load(dir.path(), &CPU));
        assert!(error.contains(named), "{config} {key}: {error}");
    }
    let experts: StateDict = [("q.lora_a".to_owned(), zeros(&[2, 2, 3])?)].into();
    fs::write(dir.path().join("adapter_config.json"), &good)?;
    save(&path, &experts)?;
    assert!(failed("adapters", mlx::load(dir.path(), &CPU)).contains("q.lora_a"));
    Ok(())
}

#[test]
fn what_mlx_lacks_is_not_saved() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let lora = LoraConfig { r: 2, lora_alpha: 6., ..Default::default() };
    for (path, kind, fan_in_fan_out) in [
        ("wpe", LayerKind::Embedding, false),
        ("wte", LayerKind::Linear, false),
        ("c", LayerKind::Conv1d { groups: 1 }, false),
        ("c_proj", LayerKind::Linear, true),
    ] {
        let adapter = StateDict::from([
            (format!("{path}.lora_A"), zeros(&[2, 3])?),
            (format!("{path}.lora_B"), zeros(&[5, 2])?.to_dtype(DType::F32)?),
        ]);
        let config = LoraConfig { fan_in_fan_out, ..lora };
        let config = AdapterConfig::from(config).with_layer(path, kind);
        let error =
            mlx::save(dir.path(), &LoraWeights::new(config, adapter)?).unwrap_err().to_string();
        assert!(error.contains(path), "{error}");
        assert_eq!(fs::read_dir(dir.path())?.count(), 0);
    }
    Ok(())
}

#[test]
fn adapter_load_names_the_reader_of_another_program_s_folder() {
    let dir = tempfile::tempdir().unwrap();
    let load = |path: &std::path::Path| match lora::Adapter::load(path, &CPU) {
        Ok(_) => panic!("{path:?} was loaded"),
        Err(error) => error.to_string(),
    };
    assert!(load(&fixture("mlx")).contains("formats::mlx::load"));
    fs::write(dir.path().join("pytorch_lora_weights.safetensors"), "").unwrap();
    assert!(load(dir.path()).contains("formats::diffusers::load"));
}
