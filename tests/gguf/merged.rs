//! Merging from file to file.

use crate::fixture::*;
use crate::{largest, CPU};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};
use loralib::adapter::AdapterConfig;
use loralib::gguf::{merge, File, MergeOptions};
use loralib::layers::LayerKind;
use loralib::utils::StateDict;
use loralib::{LoraConfig, LoraWeights, Result};
use std::collections::BTreeMap;
use std::fs;

pub fn config(lora_alpha: f64) -> AdapterConfig {
    LoraConfig { r: 4, lora_alpha, ..Default::default() }.into()
}

/// A file's tensors as Hugging Face has them.
pub fn values(file: &File) -> Result<BTreeMap<String, Tensor>> {
    let vb = file.dense_var_builder(DType::F32, &CPU)?;
    let names = expected_names().remove(file.architecture()).unwrap().into_keys();
    let names = names.filter(|name| vb.contains_tensor(name));
    names.map(|name| Ok((name.clone(), vb.get_unchecked(&name)?))).collect()
}

/// What an adapter adds to a weight.
pub fn update(adapter: &StateDict, name: &str, scaling: f64) -> Option<Tensor> {
    let path = name.strip_suffix(".weight")?;
    let a = adapter.get(&format!("{path}.lora_A"))?;
    let product = adapter[&format!("{path}.lora_B")].matmul(a).unwrap();
    let product = if path.ends_with("embed_tokens") { product.t().unwrap() } else { product };
    Some((product * scaling).unwrap())
}

#[test]
fn a_merged_file_has_the_sum_within_the_rounding_of_its_dtype() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("merged.gguf");
    // The largest error of a value, in parts of the largest value of the tensor.
    let cases = [
        (GgmlDType::F32, 1e-6, 0),
        (GgmlDType::F16, 1. / 2048., 1),
        (GgmlDType::BF16, 1. / 256., 32),
        (GgmlDType::Q8_0, 0.6 / 127., 7),
    ];
    for architecture in expected_names().into_keys() {
        let head = !matches!(&*architecture, "gemma" | "gemma2");
        let base = File::open(write_model(dir.path(), &architecture, head, GgmlDType::Q4_0))?;
        let (before, adapter) = (values(&base)?, adapter(&architecture, head, |_| 4));
        let weights = LoraWeights::new(config(8.), adapter.clone())?;
        for (dtype, bound, file_type) in cases {
            let (mut done, mut steps) = (0, 0);
            let kept = merge(&base, &weights, &out, dtype, |progress| {
                assert!(progress.done > done && progress.done <= progress.total);
                (done, steps) = (progress.done, steps + 1);
            })?;
            assert_eq!(kept.len() * 2, adapter.len());
            assert!(kept.values().all(|kept| (kept - 1.).abs() < 0.05), "{kept:?}");
            let merged = File::open(&out)?;
            assert_eq!(steps, merged.tensor_names().count());
            assert_eq!(merged.metadata()["general.file_type"].to_u32()?, file_type);
            assert_eq!(merged.config::<serde_json::Value>()?, base.config::<serde_json::Value>()?);
            for (name, after) in values(&merged)? {
                let gguf = &expected_names()[&architecture][&name];
                let Some(update) = update(&adapter, &name, 2.) else {
                    let bytes = |file: &File| {
                        Ok::<_, loralib::Error>(file.tensor(gguf, &CPU)?.data()?.into_owned())
                    };
                    assert_eq!(bytes(&merged)?, bytes(&base)?, "{name}");
                    continue;
                };
                assert_eq!(merged.tensor(gguf, &CPU)?.dtype(), dtype);
                let expected = (&before[&name] + update)?;
                let error = largest(&(after - &expected)?);
                assert!(
                    error <= bound * largest(&expected),
                    "{architecture} {name} {dtype:?} {error}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn the_rest_of_the_file_is_the_base_s_byte_for_byte() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (path, out) = (dir.path().join("base.gguf"), dir.path().join("out.gguf"));
    let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    // Not sorted, of another alignment, and with text that is not UTF-8.
    let header = |file_type: u8, tensors: &[(&str, &[u64], u32, u64)]| {
        let metadata: [(&str, u32, &[u8]); 7] = [
            ("tokenizer.ggml.x", 9, b"\x08\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\xff\xfe"),
            ("general.file_type", 4, &[file_type, 0, 0, 0]),
            ("general.architecture", 8, &string("llama")),
            ("general.alignment", 4, &[128, 0, 0, 0]),
            ("llama.block_count", 4, &[1, 0, 0, 0]),
            ("llama.attention.head_count", 4, &[2, 0, 0, 0]),
            ("a.float", 12, &[1, 2, 3, 4, 5, 6, 7, 8]),
        ];
        let mut bytes = raw(3, &metadata, tensors);
        bytes.resize((bytes.len() - 1024).next_multiple_of(128), 0);
        bytes
    };
    let mut bytes = header(
        2,
        &[
            ("token_embd.weight", &[32, 2], 8, 0),
            ("blk.0.attn_q.weight", &[32, 4], 2, 128),
            ("rope_freqs.weight", &[8], 0, 256),
            ("output_norm.weight", &[32], 0, 384),
        ],
    );
    let start = bytes.len();
    // Bytes of small floats.
    bytes.extend((0..512).map(|i| (i % 48) as u8));
    fs::write(&path, &bytes)?;
    let base = File::open(&path)?;
    let q = "model.layers.0.self_attn.q_proj";
    let adapter = StateDict::from([
        (format!("{q}.lora_A"), random(0, &[4, 32])),
        (format!("{q}.lora_B"), random(1, &[4, 4])),
    ]);
    let adapter = LoraWeights::new(config(8.), adapter)?;
    merge(&base, &adapter, &out, GgmlDType::F16, |_| {})?;
    let written = fs::read(&out)?;
    let expected = header(
        1,
        &[
            ("token_embd.weight", &[32, 2], 8, 0),
            ("blk.0.attn_q.weight", &[32, 4], 1, 128),
            ("rope_freqs.weight", &[8], 0, 384),
            ("output_norm.weight", &[32], 0, 512),
        ],
    );
    assert_eq!(written[..start], expected);
    for (before, after, size) in [(0, 0, 68), (256, 384, 32), (384, 512, 128)] {
        assert_eq!(written[start + after..][..size], bytes[start + before..][..size]);
    }
    // Into the base's own file, with the same content.
    merge(&base, &adapter, &path, GgmlDType::F16, |_| {})?;
    assert_eq!(fs::read(&path)?, written);
    // candle reads a merged file of its own alignment too.
    let small = File::open(write_model(dir.path(), "llama", true, GgmlDType::Q4_0))?;
    let adapter = LoraWeights::new(config(8.), crate::fixture::adapter("llama", true, |_| 4))?;
    merge(&small, &adapter, &out, GgmlDType::Q8_0, |_| {})?;
    let mut file = fs::File::open(&out)?;
    let content = Content::read(&mut file)?;
    for name in File::open(&out)?.tensor_names() {
        let theirs = content.tensor(&mut file, name, &CPU)?;
        assert_eq!(theirs.data()?, File::open(&out)?.tensor(name, &CPU)?.data()?);
    }
    Ok(())
}

#[test]
fn an_update_that_rounding_erases_is_refused_unless_forced() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("merged.gguf");
    let adapter = adapter("llama", true, |_| 4);
    // Much less than a step of the grid.
    let (small, large) = (config(0.1), LoraWeights::new(config(8.), adapter.clone())?);
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0] {
        let base = File::open(write_model(dir.path(), "llama", true, dtype))?;
        let small = if dtype == GgmlDType::Q8_0 { config(0.001) } else { small.clone() };
        let scaling = small.lora.scaling();
        let small = LoraWeights::new(small, adapter.clone())?;
        let error = merge(&base, &small, &out, dtype, |_| {}).unwrap_err().to_string();
        assert!(error.contains("llama.gguf") && error.contains(".weight"), "{error}");
        assert!(
            error.contains(&format!("{dtype:?}")) && error.contains("% of its update"),
            "{error}"
        );
        assert_eq!(error.contains("own dtype"), dtype != GgmlDType::Q8_0, "{error}");
        assert!(!out.exists());
        // Whatever is left of a large update, in less than 8 bits.
        let kept = merge(&base, &large, &out, dtype, |_| {});
        assert_eq!(kept.is_ok(), dtype == GgmlDType::Q8_0);
        let options = MergeOptions { dtype, force: true };
        let kept = merge(&base, &small, &out, options, |_| {})?;
        let before = values(&base)?;
        for (name, after) in values(&File::open(&out)?)? {
            let Some(update) = update(&adapter, &name, scaling) else { continue };
            let dot = |a: &Tensor, b: &Tensor| (a * b)?.sum_all()?.to_scalar::<f32>();
            let share = dot(&(after - &before[&name])?, &update)? / dot(&update, &update)?;
            let kept = kept[&name];
            assert!((f64::from(share) - kept).abs() < 0.02, "{name} {share} {kept}");
        }
        fs::remove_file(&out)?;
    }
    Ok(())
}

#[test]
fn the_output_layer_of_an_adapted_embedding_becomes_a_tensor_of_its_own() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("merged.gguf");
    let pair = StateDict::from([
        ("model.embed_tokens.lora_A".to_owned(), random(0, &[4, VOCAB])),
        ("model.embed_tokens.lora_B".to_owned(), random(1, &[HIDDEN, 4])),
    ]);
    let weights = LoraWeights::new(config(8.), pair.clone())?;
    for architecture in ["llama", "gemma3"] {
        let base = File::open(write_model(dir.path(), architecture, false, GgmlDType::Q4_0))?;
        merge(&base, &weights, &out, GgmlDType::F16, |_| {})?;
        let merged = File::open(&out)?;
        let (head, before) =
            (merged.tensor("output.weight", &CPU)?, base.tensor("token_embd.weight", &CPU)?);
        assert_eq!(head.data()?, before.data()?);
        assert_eq!(merged.tensor("token_embd.weight", &CPU)?.dtype(), GgmlDType::F16);
        assert_eq!(merged.config::<serde_json::Value>()?["tie_word_embeddings"], false);
    }
    let gemma = File::open(write_model(dir.path(), "gemma", false, GgmlDType::Q4_0))?;
    let error = merge(&gemma, &weights, &out, GgmlDType::F16, |_| {}).unwrap_err();
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
    // With PEFT's `ensure_weight_tying` it stays the output layer, and has the update.
    let mut tied = pair.clone();
    for (last, other) in [("lora_A", "lora_B"), ("lora_B", "lora_A")] {
        let factor = pair[&format!("model.embed_tokens.{other}")].t()?;
        tied.insert(format!("lm_head.{last}"), factor.contiguous()?);
    }
    merge(&gemma, &LoraWeights::new(config(8.), tied)?, &out, GgmlDType::F32, |_| {})?;
    let merged = File::open(&out)?;
    assert!(merged.tensor("output.weight", &CPU).is_err());
    let merged = merged.tensor("token_embd.weight", &CPU)?.dequantize(&CPU)?;
    let before = gemma.tensor("token_embd.weight", &CPU)?.dequantize(&CPU)?;
    assert!(largest(&(merged - before)?) > 1e-2);
    // Trained as a whole, it is the output layer too.
    let whole =
        StateDict::from([("model.embed_tokens.weight".to_owned(), random(0, &[VOCAB, HIDDEN]))]);
    let whole = LoraWeights::new(AdapterConfig::default(), whole)?;
    merge(&gemma, &whole, &out, GgmlDType::F32, |_| {})?;
    let merged = File::open(&out)?.tensor("token_embd.weight", &CPU)?.dequantize(&CPU)?;
    assert_eq!(largest(&(merged - random(0, &[VOCAB, HIDDEN]))?), 0.);
    Ok(())
}

#[test]
fn biases_norms_and_modules_replace_those_of_the_base() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("merged.gguf");
    for (architecture, names) in [
        ("qwen2", &["model.layers.1.self_attn.k_proj.bias", "lm_head.weight"][..]),
        ("gemma3", &["model.layers.1.self_attn.q_norm.weight", "model.norm.weight"]),
        ("llama", &["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]),
    ] {
        let base = File::open(write_model(dir.path(), architecture, true, GgmlDType::Q4_0))?;
        let trained = |name: &str| (name.to_owned(), random(99, &dims(name)));
        let adapter: StateDict = names.iter().map(|name| trained(name)).collect();
        let weights = LoraWeights::new(AdapterConfig::default(), adapter.clone())?;
        let kept = merge(&base, &weights, &out, GgmlDType::F32, |_| {})?;
        assert!(kept.keys().eq(adapter.keys()));
        let (before, after) = (values(&base)?, values(&File::open(&out)?)?);
        for (name, tensor) in &after {
            let expected = adapter.get(name).unwrap_or(&before[name]);
            assert!(largest(&(tensor - expected)?) < 1e-6, "{name}");
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_merged_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let base = File::open(write_model(dir.path(), "llama", true, GgmlDType::Q4_0)).unwrap();
    let q = "model.layers.0.self_attn.q_proj";
    let pair = |path: &str, a: Tensor| {
        StateDict::from([
            (format!("{path}.lora_A"), a),
            (format!("{path}.lora_B"), random(1, &[64, 4])),
        ])
    };
    let good = || pair(q, random(0, &[4, 64]));
    let huge = pair(q, (random(0, &[4, 64]) * 1e6).unwrap());
    let nan = pair(q, (random(0, &[4, 64]) / 0.).unwrap());
    let conv = config(8.).with_layer("q_proj", LayerKind::Conv1d { groups: 2 });
    let unused = config(8.).with_layer("v_proj", LayerKind::Linear);
    for (adapter, config, reason) in [
        (StateDict::new(), config(8.), "empty"),
        (good(), LoraConfig { r: 8, ..Default::default() }.into(), "r = 8"),
        (good(), unused, "v_proj"),
    ] {
        let error = LoraWeights::new(config, adapter).unwrap_err().to_string();
        assert!(error.contains(reason), "{error:?} {reason:?}");
    }
    let cases = [
        (
            pair("model.layers.2.self_attn.q_proj", random(0, &[4, 64])),
            config(8.),
            GgmlDType::F16,
            "layers.2",
        ),
        (pair(q, random(0, &[4, 32])), config(8.), GgmlDType::F16, "q_proj.weight"),
        (good(), LoraConfig { r: 2, ..Default::default() }.into(), GgmlDType::F16, "r = 2"),
        (good(), conv, GgmlDType::F16, "Conv1d"),
        (good(), config(8.), GgmlDType::Q4K, "\"blk.0.attn_q.weight\": blocks of 256 values (Q4K)"),
        (good(), config(8.), GgmlDType::Q8_1, "Q8_1"),
        (huge, config(8.), GgmlDType::F16, "does not fit F16"),
        (nan, config(8.), GgmlDType::F32, "not finite"),
    ];
    for (adapter, config, dtype, reason) in cases {
        let weights = LoraWeights::new(config, adapter).unwrap();
        let error = merge(&base, &weights, &out, dtype, |_| {}).unwrap_err().to_string();
        assert!(error.contains("llama.gguf") && error.contains(reason), "{error:?} {reason:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    let nowhere = dir.path().join("none/out.gguf");
    let good = LoraWeights::new(config(8.), good()).unwrap();
    let error = merge(&base, &good, &nowhere, GgmlDType::F16, |_| {}).unwrap_err();
    assert!(error.to_string().contains("none"), "{error}");
    let falcon = dir.path().join("falcon.gguf");
    write_file(
        &falcon,
        &metadata("falcon"),
        &BTreeMap::from([(
            "a".into(),
            QTensor::quantize(&random(0, &[4]), GgmlDType::F32).unwrap(),
        )]),
    );
    let falcon = File::open(&falcon).unwrap();
    let error = merge(&falcon, &good, &out, GgmlDType::F16, |_| {}).unwrap_err();
    assert!(error.to_string().contains("\"falcon\""), "{error}");
    // A base without quantised tensors gets the version of those it has now.
    let plain = File::open(write_model(dir.path(), "llama", true, GgmlDType::F32)).unwrap();
    merge(&plain, &good, &out, GgmlDType::Q8_0, |_| {}).unwrap();
    let merged = File::open(&out).unwrap();
    assert!(matches!(merged.metadata()["general.quantization_version"], Value::U32(2)));
}
