//! Damaged files are errors, or give tensors of the shapes that they declare. None is a panic.

use crate::fixture::*;
use crate::CPU;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::DType;
use loralib::gguf::File;
use loralib::Result;
use rand::Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Reads everything that a file can give; the number of tensors.
fn read_all(path: &Path, names: &[String]) -> Result<usize> {
    let file = File::open(path)?;
    let _ = (file.config::<serde_json::Value>(), file.tokenizer_json(), file.chat_template());
    for name in file.tensor_names() {
        file.tensor(name, &CPU)?;
    }
    let vb = file.var_builder(DType::F32, &CPU)?;
    let mut count = 0;
    for name in names.iter().filter(|name| vb.contains_tensor(name)) {
        let tensor = vb.get_unchecked(name)?;
        count += usize::from(vb.get(tensor.shape(), name)?.dims() == tensor.dims());
    }
    Ok(count)
}

#[test]
fn damaged_files_never_panic_and_truncated_ones_give_no_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.gguf");
    // Small tensors, so that most damage is in the header.
    let tensors: BTreeMap<_, _> = [
        ("blk.0.attn_norm.weight", vec![4], GgmlDType::F32),
        ("blk.0.attn_k.weight", vec![4, 32], GgmlDType::Q4_0),
        ("blk.0.attn_q.weight", vec![8, 32], GgmlDType::Q8_0),
        ("blk.1.ffn_up.weight", vec![1, 256], GgmlDType::Q6K),
        ("output.weight", vec![2, 3], GgmlDType::F16),
        ("rope_freqs.weight", vec![8], GgmlDType::F32),
        ("token_embd.weight", vec![2, 4], GgmlDType::F32),
    ]
    .into_iter()
    .map(|(name, dims, dtype)| {
        (name.to_owned(), QTensor::quantize(&random(1, &dims), dtype).unwrap())
    })
    .collect();
    write_file(&path, &metadata("llama"), &tensors);
    let names = Vec::from_iter(expected_names().remove("llama").unwrap().into_keys());
    let good = fs::read(&path).unwrap();
    assert_eq!(read_all(&path, &names).unwrap(), 6);
    // The last tensor ends the file.
    for length in 0..good.len() - 1 {
        replace(&path, &good[..length]);
        let error = File::open(&path).unwrap_err().to_string();
        assert!(error.contains("damaged.gguf"), "{length} {error}");
    }
    let (mut rng, mut ends) = (ChaCha8Rng::seed_from_u64(0), [0; 2]);
    let header = good.len() - tensors.values().map(|t| t.storage_size_in_bytes()).sum::<usize>();
    for _ in 0..5000 {
        let mut bad = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..header);
            bad[at] = match rng.random_range(0..4) {
                0 => rng.random(),
                1 => bad[at] ^ (1 << rng.random_range(0..8)),
                2 => bad[at].wrapping_add(1),
                _ => [0, 1, 0x7f, 0x80, 0xff][rng.random_range(0..5)],
            };
        }
        replace(&path, &bad);
        match read_all(&path, &names) {
            Ok(count) => {
                assert!(count <= 6);
                ends[0] += 1;
            }
            Err(error) => {
                assert!(error.to_string().contains("damaged.gguf"), "{error}");
                ends[1] += 1;
            }
        }
    }
    println!("{ends:?} of {} bytes", good.len());
    assert!(ends[0] > 100 && ends[1] > 1000, "{ends:?}");
}
