//! Metadata as the converter writes it. The divisors are torch's, by the converter's formula.

use crate::fixture::{random, text, write_file};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::Tensor;
use loralib::gguf::File;
use loralib::Result;
use serde_json::json;
use std::collections::BTreeMap;

/// `rope_freqs.weight` of Llama 3.2 1B: theta 500000, 32 pairs, factor 32.
const DIVISORS: [f32; 32] = [
    1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.651329, 3.292262,
    9.66673, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0, 32.0,
];

/// A small model's metadata, with more keys or other values.
fn metadata(architecture: &str, more: &[(&str, Value)]) -> BTreeMap<String, Value> {
    let sizes = [
        ("block_count", 16),
        ("context_length", 4096),
        ("embedding_length", 2048),
        ("feed_forward_length", 8192),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 8),
    ];
    let sizes = sizes.map(|(key, size)| (key, Value::U32(size)));
    let eps = ("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    let all = sizes.into_iter().chain([eps]).chain(more.iter().cloned());
    all.map(|(key, value)| (format!("{architecture}.{key}"), value)).collect()
}

/// The configuration in a file of this metadata, with 100 tokens, and an output layer if not `tied`.
fn config(
    architecture: &str,
    mut metadata: BTreeMap<String, Value>,
    tied: bool,
    divisors: Option<&[f32]>,
) -> Result<serde_json::Value> {
    let (dir, table) = (tempfile::tempdir()?, random(0, &[100, 4]));
    let head = (!tied).then(|| ("output.weight", table.clone()));
    let divisors = divisors.map(|values| Tensor::new(values, &crate::CPU)).transpose()?;
    let divisors = divisors.map(|values| ("rope_freqs.weight", values));
    let tensors = [("token_embd.weight", table)].into_iter().chain(head).chain(divisors);
    let tensors = tensors
        .map(|(name, tensor)| Ok((name.to_owned(), QTensor::quantize(&tensor, GgmlDType::F32)?)));
    metadata.insert("general.architecture".to_owned(), text(architecture));
    let path = dir.path().join("model.gguf");
    write_file(&path, &metadata, &tensors.collect::<Result<_>>()?);
    File::open(&path)?.config()
}

fn read(architecture: &str, more: &[(&str, Value)]) -> Result<serde_json::Value> {
    config(architecture, metadata(architecture, more), false, None)
}

fn error(architecture: &str, more: &[(&str, Value)]) -> String {
    read(architecture, more).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn llama_has_every_field_and_llama_cpp_s_default_theta() -> Result<()> {
    let mut metadata = metadata("llama", &[]);
    metadata.insert("tokenizer.ggml.bos_token_id".into(), Value::U32(1));
    let expected = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": 1,
        "eos_token_id": null,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pad_token_id": null,
        "rms_norm_eps": 1e-5,
        "rope_scaling": null,
        "rope_theta": 10000.0,
        "sliding_window": null,
        "tie_word_embeddings": true,
        "vocab_size": 100,
    });
    assert_eq!(config("llama", metadata, true, None)?, expected);
    Ok(())
}

#[test]
fn each_architecture_has_its_own_fields() -> Result<()> {
    let window = ("attention.sliding_window", Value::U32(512));
    let long_key =
        [("attention.key_length", Value::U32(256)), ("attention.value_length", Value::U32(256))];
    let gemma = [&long_key[..], std::slice::from_ref(&window)].concat();
    let large = |layers| [&gemma[..], &[("block_count", Value::U32(layers))]].concat();
    let phi =
        [("rope.dimension_count", Value::U32(48)), ("attention.sliding_window", Value::U32(0))];
    let cases = [
        ("qwen2", vec![], json!({ "sliding_window": 4096, "use_sliding_window": false })),
        ("qwen3", long_key.to_vec(), json!({ "sliding_window": null, "head_dim": 256 })),
        ("qwen3", vec![], json!({ "max_window_layers": 16, "hidden_act": "silu" })),
        ("gemma", long_key.to_vec(), json!({ "hidden_activation": "gelu_pytorch_tanh" })),
        ("gemma2", long_key.to_vec(), json!({ "sliding_window": 4096 })),
        ("gemma2", gemma.clone(), json!({ "sliding_window": 512, "query_pre_attn_scalar": 256 })),
        ("gemma2", large(46), json!({ "query_pre_attn_scalar": 64 })),
        (
            "gemma2",
            vec![],
            json!({ "attn_logit_softcapping": 50., "final_logit_softcapping": 30. }),
        ),
        ("gemma3", gemma.clone(), json!({ "model_type": "gemma3_text", "head_dim": 256 })),
        (
            "gemma3",
            gemma.clone(),
            json!({ "rope_local_base_freq": 1e4, "sliding_window_pattern": 6 }),
        ),
        ("gemma3", large(46), json!({ "query_pre_attn_scalar": 256 })),
        ("gemma3", large(62), json!({ "query_pre_attn_scalar": 64 })),
        ("phi3", phi.to_vec(), json!({ "partial_rotary_factor": 0.75, "sliding_window": null })),
        ("phi3", vec![window], json!({ "sliding_window": 512 })),
    ];
    for (architecture, more, expected) in cases {
        let config = read(architecture, &more)?;
        for (key, value) in expected.as_object().into_iter().flatten() {
            assert_eq!(&config[key], value, "{architecture} {more:?} {key}");
        }
    }
    Ok(())
}

#[test]
fn the_pattern_of_sliding_windows_is_read_from_its_flags() -> Result<()> {
    let read = |flags: &[bool]| {
        let flags = Value::Array(flags.iter().map(|flag| Value::Bool(*flag)).collect());
        let more = [
            ("attention.sliding_window_pattern", flags),
            ("attention.sliding_window", Value::U32(512)),
        ];
        Ok::<_, loralib::Error>(read("gemma3", &more)?["sliding_window_pattern"].clone())
    };
    assert_eq!(read(&[true, true, false, true, true, false, true])?, 3);
    assert!(read(&[true, false, true, true]).is_err());
    Ok(())
}

#[test]
fn llama3_s_scaling_is_recovered_from_its_divisors() -> Result<()> {
    let theta = [("rope.freq_base", Value::F32(500_000.))];
    let read = |divisors: &[f32]| {
        let metadata = metadata("llama", &theta);
        Ok::<_, loralib::Error>(
            config("llama", metadata, true, Some(divisors))?["rope_scaling"].clone(),
        )
    };
    let expected = json!({
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(read(&DIVISORS)?, expected);
    assert_eq!(read(&[1.; 32])?, serde_json::Value::Null);
    for i in 0..32 {
        let mut wrong = DIVISORS;
        wrong[i] *= if i == 31 { 0.999 } else { 1.001 };
        assert!(read(&wrong).is_err(), "{i}");
    }
    assert!(read(&DIVISORS[..31]).is_err());
    assert!(read(&[]).is_err());
    assert!(read(&[f32::NAN; 32]).is_err());
    let qwen2 = config("qwen2", metadata("qwen2", &theta), true, Some(&DIVISORS));
    assert!(qwen2.is_err());
    Ok(())
}

#[test]
fn linear_and_yarn_scaling_are_hugging_face_s() -> Result<()> {
    let factor = ("rope.scaling.factor", Value::F32(4.));
    let kind = |kind: &str| ("rope.scaling.type", text(kind));
    let original = ("rope.scaling.original_context_length", Value::U32(1024));
    let linear = json!({ "rope_type": "linear", "factor": 4.0 });
    let yarn =
        json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024 });
    let cases = [
        (vec![kind("linear"), factor.clone()], linear.clone()),
        (vec![factor.clone()], linear.clone()),
        (vec![("rope.scale_linear", Value::F32(4.))], linear),
        (vec![kind("none"), factor.clone()], json!(null)),
        (vec![kind("linear"), ("rope.scaling.factor", Value::F32(1.))], json!(null)),
        (vec![kind("yarn"), factor, original], yarn),
    ];
    for (more, expected) in cases {
        assert_eq!(read("qwen2", &more)?["rope_scaling"], expected, "{more:?}");
    }
    Ok(())
}

#[test]
fn errors_name_the_key_or_the_value() {
    let cases = [
        ("falcon", vec![], "\"falcon\""),
        ("falcon", vec![], "llama, qwen2, qwen3, gemma, gemma2, gemma3, phi3"),
        ("gemma3", vec![], "\"gemma3.attention.sliding_window\""),
        ("llama", vec![("block_count", text("16"))], "\"llama.block_count\" is String(\"16\")"),
        ("llama", vec![("block_count", Value::I32(-1))], "\"llama.block_count\" is I32(-1)"),
        ("llama", vec![("attention.head_count", Value::U32(0))], "head_count\" is 0"),
        ("llama", vec![("rope.freq_base", Value::F32(f32::NAN))], "\"llama.rope.freq_base\""),
        ("llama", vec![("attention.head_count_kv", Value::Array(vec![]))], "array of 0 items"),
        ("llama", vec![("attention.value_length", Value::U32(32))], "value head of 32"),
        ("llama", vec![("rope.dimension_count", Value::U32(32))], "rotating 32 dimensions"),
        ("llama", vec![("expert_count", Value::U32(8))], "\"llama.expert_count\""),
        ("llama", vec![("attention.causal", Value::Bool(false))], "causal"),
        ("qwen2", vec![("attention.sliding_window", Value::U32(8))], "sliding_window"),
        ("llama", vec![("rope.scaling.type", text("longrope"))], "\"longrope\""),
        ("llama", vec![("rope.scaling.type", text("yarn"))], "\"llama.rope.scaling.factor\""),
        ("phi3", vec![("rope.scaling.attn_factor", Value::F32(1.2))], "rope.scaling.attn_factor"),
        ("phi3", vec![("rope.scaling.original_context_length", Value::U32(8))], "8 positions"),
    ];
    for (architecture, more, part) in cases {
        let error = error(architecture, &more);
        assert!(error.contains(part), "{error:?} {part:?}");
    }
    for key in metadata("llama", &[]).into_keys().filter(|key| !key.ends_with("head_count_kv")) {
        let mut metadata = metadata("llama", &[]);
        metadata.remove(&key);
        let error = config("llama", metadata, true, None).err().map(|e| e.to_string());
        assert!(error.is_some_and(|error| error.contains(&key)), "{key}");
    }
}

/// candle's own configurations of some models have no such field, and ignore what they do not know.
#[test]
fn a_configuration_without_a_field_for_the_rope_s_scaling_is_refused() -> Result<()> {
    #[derive(serde::Deserialize)]
    #[allow(dead_code)]
    struct Plain {
        hidden_size: usize,
    }
    #[derive(serde::Deserialize)]
    #[allow(dead_code)]
    struct Scaled {
        rope_scaling: Option<serde_json::Value>,
    }
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    let write = |more: &[(&str, Value)]| -> Result<File> {
        let mut metadata = metadata("qwen2", more);
        metadata.insert("general.architecture".to_owned(), text("qwen2"));
        let table = QTensor::quantize(&random(0, &[100, 4]), GgmlDType::F32)?;
        write_file(&path, &metadata, &[("token_embd.weight".to_owned(), table)].into());
        File::open(&path)
    };
    let file =
        write(&[("rope.scaling.type", text("linear")), ("rope.scaling.factor", Value::F32(4.))])?;
    let error = file.config::<Plain>().err().unwrap().to_string();
    assert!(error.contains("rope_scaling") && error.contains("model.gguf"), "{error}");
    assert!(file.config::<Scaled>()?.rope_scaling.is_some());
    file.config::<serde_json::Value>()?;
    write(&[])?.config::<Plain>()?;
    Ok(())
}

/// The size that a header tells costs no memory.
#[test]
fn a_head_of_any_size_beside_few_divisors_is_an_error() -> Result<()> {
    let more = [
        ("attention.key_length", Value::U64(1 << 42)),
        ("attention.value_length", Value::U64(1 << 42)),
    ];
    let metadata = metadata("llama", &more);
    let error = config("llama", metadata, true, Some(&DIVISORS)).unwrap_err().to_string();
    assert!(error.contains("32 divisors"), "{error}");
    Ok(())
}
