//! Damaged files: an error that names the file, or a load for a reason that is told here. A safetensors
//! file has no checksum, so that other values are another adapter; whatever else is lost is noticed.

use crate::mutants::mutants;
use crate::{alone, fixture, CPU, LARGEST};
use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use lora::peft::{self, PeftConfig};
use lora::{Checkpoint, LoraConfig, StateDict, Strict};
use loralib as lora;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

/// How many mutants ended how.
type Ends = BTreeMap<&'static str, usize>;

/// Reads each mutant of `bad`; `judge` gives the reason why one that loads may.
fn judged<T>(
    bad: &Path,
    random: usize,
    read: impl Fn() -> lora::Result<T>,
    judge: impl Fn(&T, T, &[u8]) -> &'static str,
) -> Ends {
    let good = fs::read(bad).unwrap();
    let (expected, name) = (read().unwrap(), bad.file_name().unwrap().to_str().unwrap());
    let (mut ends, mut largest) = (Ends::new(), 0);
    mutants(&good, random, |mutant| {
        // A new file: some file systems flush one that is written over.
        fs::remove_file(bad).unwrap();
        fs::write(bad, mutant).unwrap();
        LARGEST.store(0, Ordering::Relaxed);
        let result = read();
        largest = largest.max(LARGEST.load(Ordering::Relaxed));
        let end = match result {
            Ok(_) if mutant == good => "the file is as it was",
            Ok(loaded) => judge(&expected, loaded, mutant),
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains(name) || error.contains("adapter_"), "{error}");
                "error"
            }
        };
        *ends.entry(end).or_default() += 1;
    });
    println!("{}: {ends:?}, {largest} bytes at once", bad.display());
    // zip has a table of 64 KiB for the end of an archive.
    assert!(largest < 8 * good.len() + (1 << 18), "{largest} bytes for a file of {}", good.len());
    ends
}

/// Whether names, shapes and dtypes are the same.
fn same_form(a: &StateDict, b: &StateDict) -> bool {
    let form = |t: &Tensor| (t.dims().to_vec(), t.dtype());
    a.keys().eq(b.keys()) && a.values().map(form).eq(b.values().map(form))
}

fn same_values(a: &StateDict, b: &StateDict) -> bool {
    let bits = |t: &Tensor| -> Vec<u64> {
        let t = t.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        t.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
    };
    a.values().map(bits).eq(b.values().map(bits))
}

/// The reason for which tensors load from a damaged safetensors file: they are those of the good one,
/// or others where its data, with which it ends, is damaged.
fn values_or_nothing(tensors: [&StateDict; 2], [good, bad]: [&[u8]; 2]) -> &'static str {
    if same_values(tensors[0], tensors[1]) {
        return "nothing is lost";
    }
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    assert!(!bad.ends_with(&good[header..]), "values that changed places");
    "other values"
}

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

fn all_are_known(ends: &Ends, allowed: &[&str]) {
    assert!(ends["error"] > 1000, "{ends:?}");
    for end in ends.keys().filter(|end| !["error", "the file is as it was"].contains(*end)) {
        assert!(allowed.contains(end), "{ends:?}");
    }
}

#[test]
fn a_damaged_torch_file_gives_the_same_tensors_or_an_error() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    for name in ["loralib_all.pt", "good.pt"] {
        let bad = dir.path().join(name);
        fs::copy(fixture(&format!("torch/{name}")), &bad).unwrap();
        let read = || Ok(lora::read_state_dict(&bad, &CPU)?.tensors);
        // The archive has a checksum of each of its files.
        let ends = judged(&bad, 1500, read, |good: &StateDict, bad, _| {
            assert!(same_form(good, &bad) && same_values(good, &bad), "{:?}", bad.keys());
            "nothing is lost"
        });
        all_are_known(&ends, &["nothing is lost"]);
    }
}

#[test]
fn a_damaged_checkpoint_loads_with_the_model_s_names_shapes_and_scaling_or_not_at_all() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.safetensors");
    let tensors = fixture("torch/loralib_all.safetensors");
    let tensors = lora::read_state_dict(tensors, &CPU).unwrap().tensors;
    let cfg = LoraConfig { r: 2, lora_alpha: 3., lora_dropout: 0.05, ..Default::default() };
    lora::save_state_dict(&tensors, &cfg, &bad).unwrap();
    let good_file = fs::read(&bad).unwrap();
    let read = || lora::read_state_dict(&bad, &CPU);
    let ends = judged(&bad, 3000, read, |good: &Checkpoint, loaded, mutant| {
        let vars = variables(&good.tensors);
        match lora::load_checkpoint(&bad, &vars, &cfg, Strict::Yes) {
            Err(error) => {
                assert!(error.to_string().contains("bad.safetensors"), "{error}");
                assert!(untouched(&vars), "an error sets nothing");
                "the model refuses it"
            }
            Ok(report) => {
                assert_eq!(report.loaded.len(), good.tensors.len());
                assert!(same_form(&good.tensors, &loaded.tensors), "{:?}", loaded.tensors.keys());
                let tensors = [&good.tensors, &loaded.tensors];
                let end = values_or_nothing(tensors, [&good_file, mutant]);
                match loaded.config {
                    // As in a file that others wrote: there is nothing to compare.
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
    all_are_known(
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
fn a_damaged_peft_adapter_loads_with_other_values_or_not_at_all() {
    let _alone = alone();
    for case in ["pattern", "modules", "conv", "groups"] {
        let dir = tempfile::tempdir().unwrap();
        let [json, tensors] = ["adapter_config.json", "adapter_model.safetensors"].map(|file| {
            fs::copy(fixture(&format!("peft/{case}/{file}")), dir.path().join(file)).unwrap();
            dir.path().join(file)
        });
        let [good_json, good_file] = [&json, &tensors].map(|path| fs::read(path).unwrap());
        type Loaded = (PeftConfig, StateDict);
        let read = || peft::load_pretrained(dir.path(), &CPU);
        let ends = judged(&json, 1500, read, |good: &Loaded, bad, mutant| {
            assert!(same_form(&good.1, &bad.1) && same_values(&good.1, &bad.1), "{case}");
            if bad.0 == good.0 {
                return "nothing is lost";
            }
            // A key that is lost would have given its place to a default.
            let json =
                |text: &[u8]| -> serde_json::Map<_, _> { serde_json::from_slice(text).unwrap() };
            let (good, bad) = (json(&good_json), json(mutant));
            let lost = good.iter().find(|(key, value)| !value.is_null() && !bad.contains_key(*key));
            assert_eq!(lost, None, "{case}");
            "an option has another value"
        });
        all_are_known(&ends, &["nothing is lost", "an option has another value"]);
        fs::write(&json, &good_json).unwrap();
        let ends = judged(&tensors, 1500, read, |good: &Loaded, bad, mutant| {
            if !same_form(&good.1, &bad.1) {
                let refused = lora::load_state_dict(&variables(&good.1), &bad.1, Strict::Yes);
                assert!(refused.is_err(), "{case}");
                return "the model refuses it";
            }
            assert_eq!(good.0, bad.0, "{case}");
            values_or_nothing([&good.1, &bad.1], [&good_file, mutant])
        });
        all_are_known(&ends, &["nothing is lost", "other values", "the model refuses it"]);
    }
}
