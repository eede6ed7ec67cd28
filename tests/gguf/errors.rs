//! Errors name the file, and the tensor or the metadata.

use crate::fixture::*;
use crate::CPU;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::DType;
use loralib::gguf::File;
use std::fs;

/// As the bytes of a string in the metadata.
const LLAMA: &[u8] = b"\x05\0\0\0\0\0\0\0llama";

#[test]
fn a_file_that_is_not_as_llama_cpp_expects_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.gguf");
    let architecture = ("general.architecture", 8, LLAMA);
    let with = |key, kind, value| raw(3, &[architecture, (key, kind, value)], &[]);
    let tensors = |tensors: &[(&str, &[u64], u32, u64)]| raw(3, &[architecture], tensors);
    let huge: &[u64] = &[32, 1 << 62, 1 << 62];
    let cases = [
        (b"GGML".to_vec(), "does not start with GGUF"),
        (vec![], "needs 4 bytes more, the file has 0"),
        (raw(1, &[architecture], &[]), "version 1 of GGUF"),
        (raw(0x0300_0000, &[architecture], &[]), "big-endian"),
        (raw(3, &[], &[]), "\"general.architecture\""),
        (
            raw(3, &[("general.architecture", 4, &[0; 4])], &[]),
            "\"general.architecture\" is U32(0)",
        ),
        (raw(3, &[architecture, architecture], &[]), "\"general.architecture\" twice"),
        (with("x", 99, &[]), "unknown type 99"),
        (with("x", 7, &[2]), "a boolean is 2"),
        (with("x", 8, &[255; 8]), "needs 18446744073709551615 bytes"),
        (with("x", 9, &[0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]), "bytes more"),
        (with("x", 9, &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].repeat(9)), "nested more than 4"),
        (with("general.alignment", 4, &[0; 4]), "alignment\" is 0"),
        (with("general.alignment", 4, &[3, 0, 0, 0]), "alignment\" is 3"),
        (with("general.alignment", 10, &[0, 0, 0, 0, 1, 0, 0, 0]), "alignment\" is 4294967296"),
        (with("split.count", 2, &[3, 0]), "a model in 3 files"),
        (tensors(&[("a", &[8], 0, 0), ("a", &[8], 0, 32)]), "\"a\": the file has it twice"),
        (tensors(&[("a", &[256], 20, 0)]), "\"a\": its dtype is IQ4_NL"),
        (tensors(&[("a", &[256], 99, 0)]), "\"a\": its dtype has the unknown number 99"),
        (tensors(&[("a", &[48, 2], 8, 0)]), "\"a\": blocks of 32 values (Q8_0) do not divide"),
        (tensors(&[("a", &[8, 1, 1, 1, 1], 0, 0)]), "\"a\": it has 5 dimensions"),
        (tensors(&[("a", &[8, 0], 0, 0)]), "\"a\": its shape is Some([0, 8])"),
        (tensors(&[("a", huge, 0, 0)]), "\"a\": a tensor of sizes"),
        (tensors(&[("a", &[1 << 61, 2], 0, 0)]), "\"a\": its shape is"),
        (tensors(&[("a", &[256, 2], 0, 0)]), "\"a\": its data ends at byte"),
        (tensors(&[("a", &[8], 0, 32)]), "\"a\": its data is at 32, expected at 0"),
        (
            tensors(&[("a", &[8], 0, 0), ("b", &[8], 0, 0)]),
            "\"b\": its data is at 0, expected at 32",
        ),
        (tensors(&[("a", &[8], 0, u64::MAX)]), "\"a\": its data is at 18446744073709551615"),
    ];
    for (bytes, reason) in cases {
        fs::write(&path, bytes).unwrap();
        let error = File::open(&path).unwrap_err().to_string();
        assert!(error.contains("bad.gguf") && error.contains(reason), "{error:?} {reason:?}");
    }
    for metadata in [&[architecture][..], &[architecture, ("general.alignment", 4, &[32, 0, 0, 0])]]
    {
        fs::write(&path, raw(2, metadata, &[("a", &[8], 0, 0), ("b", &[32, 2], 8, 32)])).unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(file.tensor_names().collect::<Vec<_>>(), ["a", "b"]);
    }
    assert!(File::open(dir.path().join("none")).unwrap_err().to_string().contains("none"));
}

#[test]
fn a_model_that_the_names_do_not_cover_has_no_var_builder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.gguf");
    let quantized = |dims: &[usize]| QTensor::quantize(&random(0, dims), GgmlDType::F32).unwrap();
    let cases: [(&str, &str, &[usize], &str); 9] = [
        ("falcon", "output_norm.weight", &[64], "\"falcon\""),
        ("llama", "blk.0.attn_q.bias", &[64], "\"blk.0.attn_q.bias\": a plain llama of 2 layers"),
        ("llama", "blk.0.ffn_gate_exps.weight", &[2, 96, 64], "\"blk.0.ffn_gate_exps.weight\""),
        ("qwen2", "blk.0.attn_q_norm.weight", &[16], "\"blk.0.attn_q_norm.weight\""),
        ("gemma", "output.weight", &[10, 64], "\"output.weight\""),
        ("phi3", "rope_factors_long.weight", &[8], "\"rope_factors_long.weight\""),
        ("llama", "output_norm.weight", &[1, 64], "[1, 64], expected 1 dimensions"),
        ("llama", "output.weight", &[64], "[64], expected 2 dimensions"),
        ("llama", "blk.0.attn_k.weight", &[33, 64], "its 33 rows are not those of 2 heads"),
    ];
    for (architecture, name, dims, reason) in cases {
        write_file(&path, &metadata(architecture), &[(name.to_owned(), quantized(dims))].into());
        let file = File::open(&path).unwrap();
        let error = file.var_builder(DType::F32, &CPU).err().unwrap().to_string();
        assert!(error.contains("other.gguf") && error.contains(reason), "{error:?} {reason:?}");
    }
    let mut metadata = metadata("llama");
    for value in [None, Some(Value::Array(vec![Value::U32(4); 2]))] {
        metadata.remove("llama.attention.head_count");
        metadata.extend(value.map(|value| ("llama.attention.head_count".to_owned(), value)));
        write_file(&path, &metadata, &[].into());
        let error = File::open(&path).unwrap().var_builder(DType::F32, &CPU).err().unwrap();
        let error = error.to_string();
        assert!(error.contains("other.gguf") && error.contains("attention.head_count"), "{error}");
    }
}

#[test]
fn reading_a_tensor_compares_its_shape() {
    let dir = tempfile::tempdir().unwrap();
    let file = File::open(write_model(dir.path(), "llama", true, GgmlDType::Q8_0)).unwrap();
    let vb = file.var_builder(DType::F32, &CPU).unwrap();
    let q = "model.layers.0.self_attn.q_proj.weight";
    let error = vb.get((64, 32), q).unwrap_err().to_string();
    assert!(error.contains("llama.gguf") && error.contains(q), "{error}");
    assert!(error.contains("[64, 64], the model expects [64, 32]"), "{error}");
    let error = vb.get(64, "model.layers.2.input_layernorm.weight").unwrap_err().to_string();
    assert!(error.contains("llama.gguf") && error.contains("layers.2"), "{error}");
    assert!(vb.get_unchecked("blk.0.attn_q.weight").is_err());
    let error = file.tensor("blk.9.attn_q.weight", &CPU).unwrap_err().to_string();
    assert!(error.contains("llama.gguf") && error.contains("blk.9"), "{error}");
    let error = file.config::<u32>().unwrap_err().to_string();
    assert!(error.contains("llama.gguf") && error.contains("does not fit"), "{error}");
    let error = file.tokenizer_json().unwrap_err().to_string();
    assert!(error.contains("llama.gguf") && error.contains("tokenizer.ggml.model"), "{error}");
}

#[test]
fn a_file_that_is_cut_off_meanwhile_gives_no_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = write_model(dir.path(), "llama", true, GgmlDType::Q8_0);
    let file = File::open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let vb = file.var_builder(DType::F32, &CPU).unwrap();
    assert!(file.tensor("output.weight", &CPU).is_err());
    let error = vb.get(64, "model.norm.weight").unwrap_err().to_string();
    assert!(error.contains("llama.gguf"), "{error}");
}

/// In memory each item of an array takes 32 bytes.
#[test]
fn an_array_of_many_bytes_in_the_metadata_is_refused() -> loralib::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("bytes.gguf");
    let array = |count: usize| Value::Array(vec![Value::U8(1); count]);
    for (count, fits) in [(1 << 20, true), ((1 << 20) + 1, false)] {
        let architecture = ("general.architecture".to_owned(), text("llama"));
        let metadata = [architecture, ("bytes".to_owned(), array(count))].into();
        write_file(&path, &metadata, &Default::default());
        let opened = File::open(&path).map(drop);
        assert_eq!(opened.is_ok(), fits);
        if let Err(error) = opened {
            let error = error.to_string();
            assert!(error.contains("1048577 bytes") && error.contains("bytes.gguf"), "{error}");
        }
    }
    Ok(())
}
