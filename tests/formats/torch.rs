//! Checkpoints of training programs, with the state dict in an entry.

use crate::{failed, CPU};
use lora::{load_state_dict, LoraConfig, Strict};
use loralib as lora;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch").join(name)
}

const NESTED: [(&str, &str); 2] =
    [("nested_model.pt", "model"), ("nested_lightning.pt", "state_dict")];

#[test]
fn an_entry_is_read_by_name() -> lora::Result<()> {
    for (file, entry) in NESTED {
        let tensors = lora::files::read_torch_entry(path(file), entry, &CPU)?;
        assert_eq!(Vec::from_iter(tensors.keys()), ["fc.lora_A", "fc.lora_B"]);
        let a = tensors["fc.lora_A"].to_vec2::<f32>()?;
        assert_eq!(a, [[0., 1., 2.], [3., 4., 5.]]);
    }
    Ok(())
}

#[test]
fn without_an_entry_the_error_lists_them() {
    for (file, entry) in NESTED {
        let error = failed(file, lora::read_state_dict(path(file), &CPU));
        assert!(error.contains(&format!("{entry:?}")), "{error}");
        assert!(error.contains("read_torch_entry"), "{error}");
        let error = failed(file, lora::files::read_torch_entry(path(file), "other", &CPU));
        assert!(error.contains("\"other\"") && error.contains(&format!("{entry:?}")), "{error}");
        let error = failed(file, lora::files::read_torch_entry(path(file), "epoch", &CPU));
        assert!(error.contains("a number"), "{error}");
    }
    let file = "nested_lightning.pt";
    let error = failed(file, lora::files::read_torch_entry(path(file), "hyper_parameters", &CPU));
    assert!(error.contains("an object"), "{error}");
    let error = failed(
        "good.safetensors",
        lora::files::read_torch_entry(path("good.safetensors"), "a", &CPU),
    );
    assert!(error.contains("torch"), "{error}");
}

#[test]
fn names_of_wrappers_are_told_and_stripped() -> lora::Result<()> {
    let tensors =
        lora::files::read_torch_entry(path("nested_wrapped.pt"), "model_state_dict", &CPU)?;
    assert!(tensors.contains_key("module._orig_mod.fc.lora_A"));
    let vars = candle_nn::VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&vars, candle_core::DType::F32, &CPU);
    let cfg = LoraConfig { r: 2, lora_alpha: 2., ..Default::default() };
    lora::linear_no_bias(3, 4, cfg, vb.pp("fc"))?;
    for strict in [Strict::Yes, Strict::No] {
        let error = load_state_dict(&vars, &tensors, strict).unwrap_err().to_string();
        assert!(error.contains("module._orig_mod.fc.lora_A"), "{error}");
        assert!(error.contains("strip_wrappers"), "{error}");
    }
    let report = load_state_dict(&vars, &lora::files::strip_wrappers(tensors)?, Strict::Yes)?;
    assert_eq!(report.loaded, ["fc.lora_A", "fc.lora_B"]);
    Ok(())
}

#[test]
fn wrappers_are_stripped_only_where_they_are_one() -> lora::Result<()> {
    let t = crate::zeros(&[1])?;
    let strip = |names: &[&str]| {
        let all = names.iter().map(|name| (name.to_string(), t.clone())).collect();
        lora::files::strip_wrappers(all).map(|all| all.into_keys().collect::<Vec<_>>())
    };
    assert_eq!(strip(&["module.a.b", "module.c"])?, ["a.b", "c"]);
    assert_eq!(strip(&["module.a", "c"])?, ["c", "module.a"]);
    assert_eq!(strip(&["h._orig_mod.a", "a_orig_mod.b"])?, ["a_orig_mod.b", "h.a"]);
    assert!(strip(&["_orig_mod.a", "a"]).is_err());
    Ok(())
}

/// safetensors has two F8 types; candle has one of them.
#[test]
fn an_f8_safetensors_file_is_read_or_refused_by_name() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("f8.safetensors");
    for (dtype, expected) in [("F8_E4M3", Some([1., -2.])), ("F8_E5M2", None)] {
        let header =
            format!(r#"{{"the f8":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,2]}}}}"#);
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(&path, [&length, header.as_bytes(), &[0x38, 0xc0]].concat())?;
        match (lora::read_state_dict(&path, &CPU), expected) {
            (Ok(read), Some(expected)) => {
                let values = read.tensors["the f8"].to_dtype(candle_core::DType::F32)?;
                assert_eq!(values.to_vec1::<f32>()?, expected);
            }
            (read, _) => assert!(failed("f8.safetensors", read).contains("the f8")),
        }
    }
    Ok(())
}
