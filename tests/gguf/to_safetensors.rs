//! Merging into a safetensors file.

use crate::fixture::*;
use crate::merged::{config, update, values};
use crate::{largest, CPU};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};
use loralib::gguf::{merge_to_safetensors, File};
use loralib::utils::StateDict;
use loralib::{read_state_dict, LoraWeights, Result};
use std::fs;

#[test]
fn the_file_has_the_sum_by_hugging_face_s_names() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("model.safetensors");
    for architecture in expected_names().into_keys() {
        let head = !matches!(&*architecture, "gemma" | "gemma2");
        let base = File::open(write_model(dir.path(), &architecture, head, GgmlDType::Q4_0))?;
        let (before, adapter) = (values(&base)?, adapter(&architecture, head, |_| 4));
        let weights = LoraWeights::new(config(8.), adapter.clone())?;
        // The largest error of a value, in parts of the largest value of the tensor.
        for (dtype, bound) in
            [(DType::F32, 1e-6), (DType::F16, 1. / 2048.), (DType::BF16, 1. / 256.)]
        {
            let (mut done, mut total) = (0, 0);
            let json = merge_to_safetensors(&base, &weights, &out, dtype, |progress| {
                assert!(progress.done > done && progress.done <= progress.total);
                (done, total) = (progress.done, progress.total);
            })?;
            assert_eq!(json, base.config::<serde_json::Value>()?);
            assert_eq!(done, total);
            let merged = read_state_dict(&out, &CPU)?.tensors;
            assert!(merged.keys().eq(before.keys()), "{architecture}");
            for (name, after) in merged {
                assert_eq!(after.dtype(), dtype);
                let expected = match update(&adapter, &name, 2.) {
                    Some(update) => (&before[&name] + update)?,
                    None => before[&name].clone(),
                };
                let error = largest(&(after.to_dtype(DType::F32)? - &expected)?);
                assert!(error <= bound * largest(&expected), "{architecture} {name}: {error}");
            }
            // As other programs read it.
            let header = fs::read(&out)?;
            let read = safetensors::SafeTensors::read_metadata(&header).unwrap().1;
            assert_eq!(read.metadata().as_ref().unwrap()["format"], "pt");
        }
    }
    Ok(())
}

#[test]
fn a_tied_head_of_an_adapted_embedding_keeps_the_base_s_table() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("model.safetensors");
    let pair = StateDict::from([
        ("model.embed_tokens.lora_A".to_owned(), random(0, &[4, VOCAB])),
        ("model.embed_tokens.lora_B".to_owned(), random(1, &[HIDDEN, 4])),
    ]);
    let pair = LoraWeights::new(config(8.), pair)?;
    let base = File::open(write_model(dir.path(), "llama", false, GgmlDType::Q4_0))?;
    assert!(base.config::<serde_json::Value>()?["tie_word_embeddings"].as_bool().unwrap());
    let json = merge_to_safetensors(&base, &pair, &out, DType::F32, |_| {})?;
    assert_eq!(json["tie_word_embeddings"], false);
    let (before, merged) = (values(&base)?, read_state_dict(&out, &CPU)?.tensors);
    let table = &before["model.embed_tokens.weight"];
    let same =
        |one: &Tensor, other: &Tensor| Ok::<_, loralib::Error>(largest(&(one - other)?) == 0.);
    assert!(same(&merged["lm_head.weight"], table)?);
    assert!(!same(&merged["model.embed_tokens.weight"], table)?);
    Ok(())
}

#[test]
fn what_cannot_be_merged_leaves_no_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("model.safetensors");
    let base = File::open(write_model(dir.path(), "llama", true, GgmlDType::Q4_0))?;
    let adapter = adapter("llama", true, |_| 4);
    let foreign = StateDict::from([
        ("model.other.lora_A".to_owned(), random(0, &[4, HIDDEN])),
        ("model.other.lora_B".to_owned(), random(1, &[HIDDEN, 4])),
    ]);
    let large: StateDict =
        adapter.iter().map(|(name, t)| Ok((name.clone(), (t * 1e4)?))).collect::<Result<_>>()?;
    for (adapter, dtype, reason) in [
        (adapter, DType::F64, "F32, BF16 or F16"),
        (foreign, DType::F32, "model.other"),
        (large, DType::F16, "not finite"),
    ] {
        let weights = LoraWeights::new(config(8.), adapter)?;
        let error = merge_to_safetensors(&base, &weights, &out, dtype, |_| {});
        let error = error.expect_err("an error").to_string();
        assert!(error.contains(reason), "{error}");
        assert!(!out.exists());
    }
    Ok(())
}
