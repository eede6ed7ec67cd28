//! A damaged file is an error that names the file, or loads for one of the reasons listed here. A
//! safetensors file has no checksum, so that changed values are a valid adapter; all other damage is found.

use crate::judge::{assert_known, judged, same_form, same_or_other_values, same_values};
use crate::{alone, fixture, CPU};
use candle_core::{DType, Var};
use candle_nn::VarMap;
use lora::formats::{diffusers, kohya, mlx, peft};
use lora::utils::{Checkpoint, StateDict};
use lora::{LoraConfig, LoraWeights, Strict};
use loralib as lora;
use std::fs;
use std::path::Path;

fn variables(tensors: &StateDict) -> VarMap {
    let vars = VarMap::new();
    for (name, tensor) in tensors {
        let zeros = tensor.to_dtype(DType::F32).and_then(|t| t.zeros_like()).unwrap();
        vars.data().lock().unwrap().insert(name.clone(), Var::from_tensor(&zeros).unwrap());
    }
    vars
}

fn untouched(vars: &VarMap) -> bool {
    let zero = |var: &Var| var.abs()?.sum_all()?.to_scalar::<f32>();
    vars.all_vars().iter().all(|var| zero(var).unwrap() == 0.)
}

#[test]
fn damaged_torch_file_keeps_its_tensors() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    for name in ["loralib_all.pt", "good.pt"] {
        let bad = dir.path().join(name);
        fs::copy(fixture(&format!("torch/{name}")), &bad).unwrap();
        let read = || Ok(lora::read_state_dict(&bad, &CPU)?.tensors);
        // The archive has a checksum for each of its files.
        let ends = judged(&bad, 1500, read, |good: &StateDict, bad, _| {
            assert!(same_form(good, &bad) && same_values(good, &bad), "{:?}", bad.keys());
            "nothing is lost"
        });
        assert_known(&ends, &["nothing is lost"]);
    }
}

#[test]
fn damaged_checkpoint_keeps_shapes_and_scaling() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.safetensors");
    let tensors = fixture("torch/loralib_all.safetensors");
    let tensors = lora::read_state_dict(tensors, &CPU).unwrap().tensors;
    let cfg = LoraConfig { r: 2, lora_alpha: 3., lora_dropout: 0.05, ..Default::default() };
    lora::save_state_dict(&tensors, cfg, &bad).unwrap();
    let good_file = fs::read(&bad).unwrap();
    let read = || lora::read_state_dict(&bad, &CPU);
    let ends = judged(&bad, 3000, read, |good: &Checkpoint, loaded, mutant| {
        let vars = variables(&good.tensors);
        match lora::load_checkpoint(&bad, &vars, cfg, Strict::Yes) {
            Err(error) => {
                assert!(error.to_string().contains("bad.safetensors"), "{error}");
                assert!(untouched(&vars), "an error sets nothing");
                "the model refuses it"
            }
            Ok(report) => {
                assert_eq!(report.loaded.len(), good.tensors.len());
                assert!(same_form(&good.tensors, &loaded.tensors), "{:?}", loaded.tensors.keys());
                let tensors = [&good.tensors, &loaded.tensors];
                let end = same_or_other_values(tensors, [&good_file, mutant]);
                match loaded.config.map(|config| config.lora) {
                    // As in a file of another program, which has no configuration to compare.
                    None => "the configuration's name is lost",
                    Some(other) if other != cfg => {
                        assert_eq!((other.scaling(), other.r), (cfg.scaling(), cfg.r));
                        "another option that a load does not use"
                    }
                    _ => end,
                }
            }
        }
    });
    assert_known(
        &ends,
        &[
            "nothing is lost",
            "other values",
            "the model refuses it",
            "the configuration's name is lost",
            "another option that a load does not use",
        ],
    );
}

#[test]
fn damaged_peft_adapter_keeps_shapes() {
    let _alone = alone();
    let cases =
        ["pattern", "modules", "conv", "groups", "lora_bias", "tokens", "parameters", "dora"];
    for case in cases {
        let dir = tempfile::tempdir().unwrap();
        let [json, tensors] = ["adapter_config.json", "adapter_model.safetensors"].map(|file| {
            fs::copy(fixture(&format!("peft/{case}/{file}")), dir.path().join(file)).unwrap();
            dir.path().join(file)
        });
        let [good_json, good_file] = [&json, &tensors].map(|path| fs::read(path).unwrap());
        let read = || peft::load(dir.path(), &CPU);
        let ends = judged(&json, 1500, read, |good: &LoraWeights, bad, mutant| {
            // Only the configuration has a parameter's name. No base has another.
            if case == "parameters" && !good.state_dict().keys().eq(bad.state_dict().keys()) {
                return "a parameter has another name";
            }
            assert!(
                same_form(&good.state_dict(), &bad.state_dict())
                    && same_values(&good.state_dict(), &bad.state_dict()),
                "{case}"
            );
            if bad.config() == good.config() {
                return "nothing is lost";
            }
            // A missing key must not be replaced by a default.
            let json =
                |text: &[u8]| -> serde_json::Map<_, _> { serde_json::from_slice(text).unwrap() };
            let (good, bad) = (json(&good_json), json(mutant));
            let lost = good.iter().find(|(key, value)| !value.is_null() && !bad.contains_key(*key));
            assert_eq!(lost, None, "{case}");
            "an option has another value"
        });
        let allowed =
            ["nothing is lost", "an option has another value", "a parameter has another name"];
        assert_known(&ends, &allowed);
        fs::write(&json, &good_json).unwrap();
        let ends = judged(&tensors, 1500, read, |good: &LoraWeights, bad, mutant| {
            if !same_form(&good.state_dict(), &bad.state_dict()) {
                let refused = lora::load_state_dict(
                    &variables(&good.state_dict()),
                    &bad.state_dict(),
                    Strict::Yes,
                );
                assert!(refused.is_err(), "{case}");
                return "the model refuses it";
            }
            assert_eq!(good.config(), bad.config(), "{case}");
            same_or_other_values([&good.state_dict(), &bad.state_dict()], [&good_file, mutant])
        });
        assert_known(&ends, &["nothing is lost", "other values", "the model refuses it"]);
    }
}

/// Mutants of a file that is read into an adapter.
fn assert_keeps_shapes(bad: &Path, random: usize, read: impl Fn() -> lora::Result<LoraWeights>) {
    let good_file = fs::read(bad).unwrap();
    let ends = judged(bad, random, read, |good: &LoraWeights, bad, mutant| {
        if !same_form(&good.state_dict(), &bad.state_dict()) {
            let refused = lora::load_state_dict(
                &variables(&good.state_dict()),
                &bad.state_dict(),
                Strict::Yes,
            );
            assert!(refused.is_err());
            return "the model refuses it";
        }
        match good.config() == bad.config() {
            true => {
                same_or_other_values([&good.state_dict(), &bad.state_dict()], [&good_file, mutant])
            }
            false => "another scaling or option",
        }
    });
    assert_known(
        &ends,
        &["nothing is lost", "other values", "the model refuses it", "another scaling or option"],
    );
}

#[test]
fn damaged_files_of_other_formats_keep_their_shapes() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let copied = |file: &str| {
        let to = dir.path().join(file.rsplit('/').next().unwrap());
        fs::copy(fixture(&format!("formats/{file}")), &to).unwrap();
        to
    };
    let names = fs::read_to_string(fixture("formats/kohya/names.txt")).unwrap();
    let names: Vec<_> = names.lines().collect();
    for case in ["attention", "conv"] {
        let bad = copied(&format!("kohya/{case}/lora.safetensors"));
        assert_keeps_shapes(&bad, 6000, || {
            let weights = kohya::with_paths(&kohya::load(&bad, &CPU)?, &names);
            // Names that no model has are an error of the names, without the file.
            weights.map_err(|e| lora::Error::File { path: bad.clone(), error: Box::new(e) })
        });
    }
    for case in ["new", "old", "processor"] {
        let bad = copied(&format!("diffusers/{case}/pytorch_lora_weights.safetensors"));
        assert_keeps_shapes(&bad, 5000, || diffusers::load(&bad, &CPU));
    }
    let json = copied("mlx/adapter_config.json");
    let bad = copied("mlx/adapters.safetensors");
    assert_keeps_shapes(&bad, 8000, || mlx::load(dir.path(), &CPU));
    fs::copy(fixture("formats/mlx/adapters.safetensors"), &bad).unwrap();
    let read = || mlx::load(dir.path(), &CPU);
    let ends = judged(&json, 9000, read, |good: &LoraWeights, bad, _| {
        assert!(
            same_form(&good.state_dict(), &bad.state_dict())
                && same_values(&good.state_dict(), &bad.state_dict())
        );
        if good.config() == bad.config() {
            "nothing is lost"
        } else {
            "another scaling or option"
        }
    });
    assert_known(&ends, &["nothing is lost", "another scaling or option"]);
}

#[test]
fn damaged_entry_of_a_torch_file_keeps_its_tensors() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("nested_model.pt", "model"),
        ("nested_lightning.pt", "state_dict"),
        ("nested_wrapped.pt", "model_state_dict"),
    ];
    for (name, entry) in cases {
        let bad = dir.path().join(name);
        fs::copy(fixture(&format!("torch/{name}")), &bad).unwrap();
        let read = || lora::files::read_torch_entry(&bad, entry, &CPU);
        let ends = judged(&bad, 6500, read, |good: &StateDict, bad, _| {
            assert!(same_form(good, &bad) && same_values(good, &bad), "{:?}", bad.keys());
            "nothing is lost"
        });
        assert_known(&ends, &["nothing is lost"]);
    }
}
