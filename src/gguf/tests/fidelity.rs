//! A model gets Hugging Face's tensors.

use crate::gguf::fixture::*;
use crate::gguf::names::Names;
use crate::gguf::{var_builder, File};
use crate::nn::Linear;
use crate::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;

const CPU: Device = Device::Cpu;

fn bits(tensor: &Tensor) -> Vec<u32> {
    let tensor = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    tensor.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn names_are_those_of_transformers_and_gguf() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (architecture, expected) in expected_names() {
        let file = File::open(write_model(dir.path(), &architecture, true, GgmlDType::Q8_0))?;
        let names = Names::of(&file)?;
        for (own, gguf) in &expected {
            assert_eq!(names.hugging_face(gguf).as_ref(), Some(own), "{architecture}");
            assert_eq!(names.gguf(own).as_ref(), Some(gguf), "{architecture}");
        }
        let other = ["blk.2.attn_q.weight", "blk.01.attn_q.weight", "blk..attn_q.weight"];
        for name in other.iter().chain(&["blk.0.attn_rot_embd.weight", "blk.0", "", "blk.0."]) {
            assert_eq!(names.hugging_face(name), None, "{architecture} {name}");
        }
    }
    Ok(())
}

#[test]
fn every_tensor_has_its_shape_dtype_and_values() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for architecture in expected_names().into_keys() {
        for (head, dtype) in [(true, GgmlDType::F32), (false, GgmlDType::F32)] {
            let file = File::open(write_model(dir.path(), &architecture, head, dtype))?;
            let vb = file.var_builder(DType::F32, &CPU)?;
            let expected = model(&architecture, head);
            assert_eq!(file.tensor_names().count(), expected.len());
            assert_eq!(
                vb.contains_tensor("lm_head.weight"),
                expected.contains_key("lm_head.weight")
            );
            for (name, tensor) in &expected {
                let loaded = vb.get(tensor.dims(), name)?;
                if architecture.starts_with("gemma") && name.ends_with("norm.weight") {
                    let diff = (loaded - tensor)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    assert!(diff < 2e-7, "{architecture} {name} {diff}");
                } else {
                    assert_eq!(bits(&loaded), bits(tensor), "{architecture} {name}");
                }
            }
            let other = vb.get_unchecked_dtype("model.norm.weight", DType::F16)?;
            assert_eq!(other.dtype(), DType::F16);
            let half = file.var_builder(DType::BF16, &CPU)?;
            assert_eq!(half.get(HIDDEN, "model.norm.weight")?.dtype(), DType::BF16);
        }
    }
    Ok(())
}

#[test]
fn blocks_are_those_of_the_rows_in_hugging_face_s_order() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::F16, GgmlDType::BF16] {
        let file = File::open(write_model(dir.path(), "llama", true, dtype))?;
        let vb = file.var_builder(DType::F32, &CPU)?;
        for (name, tensor) in model("llama", true) {
            let loaded = vb.get(tensor.dims(), &name)?;
            if tensor.rank() == 1 {
                assert_eq!(bits(&loaded), bits(&tensor), "{name}");
                continue;
            }
            // a placeholder
            assert!(bits(&loaded).iter().all(|bits| f32::from_bits(*bits).is_nan()), "{name}");
            let gguf = &expected_names()["llama"][&name];
            let layer = Linear::new(loaded, None);
            let blocks = layer.quantized_weight().unwrap();
            let expected = QTensor::quantize(&tensor, dtype)?;
            assert_eq!(blocks.dtype(), dtype);
            assert_eq!(blocks.data()?, expected.data()?, "{name}");
            let again = Linear::new(vb.get(tensor.dims(), &name)?, None);
            assert!(Arc::ptr_eq(blocks, again.quantized_weight().unwrap()));
            let stored = converted("llama", &name, &tensor, dtype);
            assert_eq!(file.tensor(gguf, &CPU)?.data()?, stored.data()?, "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_file_has_its_metadata_configuration_and_template() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for architecture in expected_names().into_keys() {
        for head in [true, false] {
            let path = write_model(dir.path(), &architecture, head, GgmlDType::Q8_0);
            let file = File::open(&path)?;
            assert_eq!(file.path(), path);
            assert_eq!(file.architecture(), architecture);
            assert_eq!(file.metadata().len(), metadata(&architecture).len());
            assert_eq!(file.chat_template(), Some("{{ messages }}"));
            let config: Value = file.config()?;
            assert_eq!(config["vocab_size"], VOCAB);
            assert_eq!(
                config["tie_word_embeddings"],
                !model(&architecture, head).contains_key("lm_head.weight")
            );
            assert_eq!(file.clone().tensor("output_norm.weight", &CPU)?.shape().dims(), [HIDDEN]);
        }
    }
    Ok(())
}

#[test]
fn the_divisors_of_llama_3_are_read_from_their_tensor() -> Result<()> {
    let (dir, mut tensors) = (tempfile::tempdir()?, std::collections::BTreeMap::new());
    let ones = Tensor::ones(8, DType::F32, &CPU)?;
    tensors.insert("rope_freqs.weight".to_owned(), QTensor::quantize(&ones, GgmlDType::F32)?);
    let embedding = random(0, &[VOCAB, HIDDEN]);
    tensors.insert("token_embd.weight".into(), QTensor::quantize(&embedding, GgmlDType::F32)?);
    let path = dir.path().join("llama.gguf");
    let mut metadata = metadata("llama");
    write_file(&path, &metadata, &tensors);
    let file = File::open(&path)?;
    assert_eq!(file.config::<Value>()?["rope_scaling"], Value::Null);
    assert!(!file.var_builder(DType::F32, &CPU)?.contains_tensor("rope_freqs.weight"));
    // With YaRN they are an error, so the tensor was read.
    metadata.insert("llama.rope.scaling.type".into(), text("yarn"));
    metadata.insert(
        "llama.rope.scaling.factor".into(),
        candle_core::quantized::gguf_file::Value::F32(2.),
    );
    write_file(&path, &metadata, &tensors);
    assert!(File::open(&path)?.config::<Value>().is_err());
    Ok(())
}

#[test]
fn tensors_in_memory_are_given_by_their_names() -> Result<()> {
    let (matrix, vector) = (random(0, &[4, 32]), random(1, &[32]));
    let quantized =
        |t: &Tensor, dtype| Ok::<_, crate::Error>(Arc::new(QTensor::quantize(t, dtype)?));
    let tensors = HashMap::from([
        ("a.weight".to_owned(), quantized(&matrix, GgmlDType::Q8_0)?),
        ("b.weight".to_owned(), quantized(&matrix, GgmlDType::F32)?),
        ("c.weight".to_owned(), quantized(&vector, GgmlDType::F16)?),
    ]);
    let vb = var_builder(tensors, DType::F32, &CPU);
    assert!(bits(&vb.get((4, 32), "a.weight")?).iter().all(|x| f32::from_bits(*x).is_nan()));
    assert_eq!(bits(&vb.get((4, 32), "b.weight")?), bits(&matrix));
    let half = vector.to_dtype(DType::F16)?;
    assert_eq!(bits(&vb.get(32, "c.weight")?), bits(&half));
    assert_eq!(vb.get_unchecked_dtype("b.weight", DType::BF16)?.dtype(), DType::BF16);
    assert!(vb.contains_tensor("a.weight") && !vb.contains_tensor("a"));
    let error = |shape: (usize, usize), name| vb.get(shape, name).unwrap_err().to_string();
    assert!(error((32, 4), "a.weight").contains("[4, 32], the model expects [32, 4]"));
    assert!(error((4, 32), "d.weight").contains("\"d.weight\""));
    Ok(())
}

#[test]
fn every_dtype_of_candle_is_read() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("dtypes.gguf");
    let dtypes = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q8_1,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
        GgmlDType::Q8K,
    ];
    let tensor = |dtype| QTensor::quantize(&random(0, &[3, 512]), dtype);
    let named = |dtype: &GgmlDType| Ok::<_, crate::Error>((format!("{dtype:?}"), tensor(*dtype)?));
    let tensors = dtypes.iter().map(named).collect::<Result<_>>()?;
    write_file(&path, &metadata("llama"), &tensors);
    let file = File::open(&path)?;
    for dtype in dtypes {
        let (own, expected) = (file.tensor(&format!("{dtype:?}"), &CPU)?, tensor(dtype)?);
        assert_eq!((own.dtype(), own.shape()), (dtype, expected.shape()));
        assert_eq!(own.data()?, expected.data()?, "{dtype:?}");
    }
    Ok(())
}
