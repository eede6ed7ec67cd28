//! Small files for tests.

use candle_core::quantized::gguf_file::{write, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use loralib::utils::StateDict;
use rand::Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The sizes of all models.
pub const LAYERS: usize = 2;
pub const HIDDEN: usize = 64;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const VOCAB: usize = 10;
const HEAD: usize = 16;
const MLP: usize = 96;

/// For each architecture, the file's names by Hugging Face's, of transformers and gguf-py.
pub fn expected_names() -> BTreeMap<String, BTreeMap<String, String>> {
    serde_json::from_str(include_str!("expected_names.json")).unwrap()
}

/// The shape of a tensor of Hugging Face.
pub fn dims(name: &str) -> Vec<usize> {
    let (layer, kind) = name.rsplit_once('.').unwrap();
    let rows = match layer.rsplit('.').next().unwrap() {
        "q_norm" | "k_norm" => return vec![HEAD],
        part if part.contains("norm") => return vec![HIDDEN],
        "embed_tokens" | "lm_head" => VOCAB,
        "q_proj" => HEADS * HEAD,
        "k_proj" | "v_proj" => KV_HEADS * HEAD,
        "qkv_proj" => (HEADS + 2 * KV_HEADS) * HEAD,
        "gate_proj" | "up_proj" => MLP,
        "gate_up_proj" => 2 * MLP,
        "o_proj" => return vec![HIDDEN, HEADS * HEAD],
        "down_proj" => return vec![HIDDEN, MLP],
        other => panic!("{other}"),
    };
    match kind {
        "bias" => vec![rows],
        _ => vec![rows, HIDDEN],
    }
}

pub fn random(seed: u64, dims: &[usize]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = dims.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1f32..1.)).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// A model of Hugging Face: tensors by name, with a head of its own if `head`.
pub fn model(architecture: &str, head: bool) -> BTreeMap<String, Tensor> {
    let names = expected_names().remove(architecture).unwrap();
    let names = names.into_keys().filter(|name| head || name != "lm_head.weight");
    names.enumerate().map(|(i, name)| (name.clone(), random(i as u64, &dims(&name)))).collect()
}

/// As llama.cpp's converter, written down by tensors: the halves of each head become neighbours.
pub fn interleaved(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, width) = weight.dims2().unwrap();
    let halves = weight.reshape((heads, 2, rows / heads / 2, width)).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, width)).unwrap()
}

/// The tensor as llama.cpp's converter stores it, quantised if it is a matrix.
pub fn converted(architecture: &str, name: &str, tensor: &Tensor, dtype: GgmlDType) -> QTensor {
    let tensor = match architecture {
        "llama" if name.ends_with("q_proj.weight") => interleaved(tensor, HEADS),
        "llama" if name.ends_with("k_proj.weight") => interleaved(tensor, KV_HEADS),
        "gemma" | "gemma2" | "gemma3" if name.ends_with("norm.weight") => (tensor + 1.).unwrap(),
        _ => tensor.clone(),
    };
    let dtype = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype };
    QTensor::quantize(&tensor, dtype).unwrap()
}

pub fn text(value: &str) -> Value {
    Value::String(value.into())
}

/// Factors for every matrix of a model, of rank `r`.
pub fn adapter(architecture: &str, head: bool, r: impl Fn(&str) -> usize) -> StateDict {
    let mut adapter = StateDict::new();
    for (i, (name, tensor)) in model(architecture, head).into_iter().enumerate() {
        let (path, &[rows, columns]) = (name.strip_suffix(".weight"), tensor.dims()) else {
            continue;
        };
        let Some(path) = path.filter(|path| head || !path.ends_with("embed_tokens")) else {
            continue;
        };
        let embedding = path.ends_with("embed_tokens");
        let (inputs, outputs) = if embedding { (rows, columns) } else { (columns, rows) };
        let r = r(path);
        adapter.insert(format!("{path}.lora_A"), random(i as u64, &[r, inputs]));
        adapter.insert(format!("{path}.lora_B"), random(i as u64 + 99, &[outputs, r]));
    }
    adapter
}

/// The metadata of a small model.
pub fn metadata(architecture: &str) -> BTreeMap<String, Value> {
    let sizes = [
        ("block_count", LAYERS),
        ("context_length", 128),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", MLP),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
        ("attention.key_length", HEAD),
        ("attention.value_length", HEAD),
    ];
    let mut metadata: BTreeMap<_, _> = sizes
        .map(|(key, size)| (format!("{architecture}.{key}"), Value::U32(size as u32)))
        .into_iter()
        .collect();
    let eps = format!("{architecture}.attention.layer_norm_rms_epsilon");
    metadata.insert(eps, Value::F32(1e-5));
    if architecture == "gemma3" {
        metadata.insert("gemma3.attention.sliding_window".into(), Value::U32(64));
    }
    metadata.insert("general.architecture".into(), text(architecture));
    metadata.insert("general.file_type".into(), Value::U32(2));
    metadata.insert("tokenizer.chat_template".into(), text("{{ messages }}"));
    metadata
}

/// Writes a file by candle.
pub fn write_file(
    path: &Path,
    metadata: &BTreeMap<String, Value>,
    tensors: &BTreeMap<String, QTensor>,
) {
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// Writes a small model whose matrices have one dtype.
pub fn write_model(dir: &Path, architecture: &str, head: bool, dtype: GgmlDType) -> PathBuf {
    let names = expected_names().remove(architecture).unwrap();
    let tensors = model(architecture, head)
        .into_iter()
        .map(|(name, t)| (names[&name].clone(), converted(architecture, &name, &t, dtype)));
    let path = dir.join(format!("{architecture}.gguf"));
    write_file(&path, &metadata(architecture), &tensors.collect());
    path
}

/// Writes a new file, because some file systems flush a file that is overwritten.
pub fn replace(path: &Path, bytes: &[u8]) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A header, followed by 1024 bytes of data: values as (key, type, bytes), tensors as (name, dimensions from
/// the last to the first, dtype, offset).
pub fn raw(
    version: u32,
    metadata: &[(&str, u32, &[u8])],
    tensors: &[(&str, &[u64], u32, u64)],
) -> Vec<u8> {
    let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut bytes = [&b"GGUF"[..], &version.to_le_bytes()].concat();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, kind, value) in metadata {
        bytes.extend([&string(key)[..], &kind.to_le_bytes(), value].concat());
    }
    for (name, dims, dtype, offset) in tensors {
        bytes.extend([&string(name)[..], &(dims.len() as u32).to_le_bytes()].concat());
        dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
        bytes.extend([&dtype.to_le_bytes()[..], &offset.to_le_bytes()].concat());
    }
    bytes.resize(bytes.len().next_multiple_of(32) + 1024, 0);
    bytes
}
