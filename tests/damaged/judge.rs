//! Reads damaged files: each is an error that names the file, or has a reason why it loads.

use crate::measured;
use crate::mutants::mutants;
use candle_core::{DType, Tensor};
use lora::utils::StateDict;
use loralib as lora;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The number of mutants for each result.
pub type Ends = BTreeMap<&'static str, usize>;

/// Reads each mutant of the file `bad`; `judge` returns the reason why a mutant may load.
pub fn judged<T>(
    bad: &Path,
    random: usize,
    read: impl Fn() -> lora::Result<T>,
    judge: impl Fn(&T, T, &[u8]) -> &'static str,
) -> Ends {
    let good = fs::read(bad).unwrap();
    let (expected, name) = (read().unwrap(), bad.file_name().unwrap().to_str().unwrap());
    let (mut ends, mut largest) = (Ends::new(), 0);
    mutants(&good, random, |mutant| {
        // A new file, because some file systems flush a file that is overwritten.
        fs::remove_file(bad).unwrap();
        fs::write(bad, mutant).unwrap();
        let (result, memory) = measured(&read);
        largest = largest.max(memory);
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
    let count: usize = ends.values().sum();
    println!("{}: {count} mutants, {ends:?}, {largest} bytes at once", bad.display());
    // zip allocates 64 KiB for the end of an archive, a regular expression up to 1 MiB.
    assert!(largest < 8 * good.len() + (1 << 20), "{largest} bytes for a file of {}", good.len());
    ends
}

/// Whether names, shapes and dtypes are the same.
pub fn same_form(a: &StateDict, b: &StateDict) -> bool {
    let form = |t: &Tensor| (t.dims().to_vec(), t.dtype());
    a.keys().eq(b.keys()) && a.values().map(form).eq(b.values().map(form))
}

pub fn same_values(a: &StateDict, b: &StateDict) -> bool {
    let bits = |t: &Tensor| -> Vec<u64> {
        let t = t.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        t.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
    };
    a.values().map(bits).eq(b.values().map(bits))
}

/// The reason why tensors load from a damaged safetensors file: they are unchanged, or the damage is in
/// the data at the end of the file.
pub fn same_or_other_values(tensors: [&StateDict; 2], [good, bad]: [&[u8]; 2]) -> &'static str {
    if same_values(tensors[0], tensors[1]) {
        return "nothing is lost";
    }
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    assert!(!bad.ends_with(&good[header..]), "tensors exchanged their values");
    "other values"
}

pub fn assert_known(ends: &Ends, allowed: &[&str]) {
    assert!(ends["error"] > 1000, "{ends:?}");
    for end in ends.keys().filter(|end| !["error", "the file is as it was"].contains(*end)) {
        assert!(allowed.contains(end), "{ends:?}");
    }
}
