//! A model's `config.json`, as Hugging Face writes it, from a file's metadata.
//!
//! Metadata tells no bias: `attention_bias` is `false`, and the file must have no tensors that say
//! otherwise.

mod keys;
mod rope_scaling;

use super::architecture::Architecture;
use super::metadata::Metadata;
use crate::{Error, Result};
use candle_core::quantized::gguf_file;
use keys::Keys;
use rope_scaling::rope_scaling;
use serde_json::{json, Value};
use std::collections::HashMap;

/// The configuration of a model whose output layer is its embedding if `tied`, and whose embedding has
/// `vocab_size` rows. `rope_freqs` is the tensor `rope_freqs.weight`.
pub(super) fn config(
    architecture: &str,
    metadata: &HashMap<String, gguf_file::Value>,
    tied: bool,
    vocab_size: usize,
    rope_freqs: Option<&[f32]>,
) -> Result<Value> {
    let (model_type, class) = Architecture::find(architecture)?.model;
    let keys = Keys { architecture, metadata: Metadata(metadata) };
    keys.refuse_unsupported()?;
    let shape = Shape::read(&keys)?;
    // llama.cpp's own default
    let rope_theta = keys.float("rope.freq_base")?.unwrap_or(10_000.);
    let token = |name: &str| keys.metadata.integer(&format!("tokenizer.ggml.{name}_token_id"));
    let mut config = json!({
        "architectures": [class],
        "attention_bias": false,
        "bos_token_id": token("bos")?,
        "eos_token_id": token("eos")?,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "intermediate_size": keys.size("feed_forward_length")?,
        "max_position_embeddings": keys.size("context_length")?,
        "model_type": model_type,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": token("padding")?,
        "rms_norm_eps": keys.required_float("attention.layer_norm_rms_epsilon")?,
        "rope_scaling": rope_scaling(&keys, rope_theta, shape.head_dim, rope_freqs)?,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
        "vocab_size": vocab_size,
    });
    let own = match architecture {
        "qwen2" | "qwen3" => qwen(&keys, &shape)?,
        "gemma" => json!({ "hidden_activation": "gelu_pytorch_tanh" }),
        "gemma2" => gemma2(&keys, &shape)?,
        "gemma3" => gemma3(&keys, &shape)?,
        "phi3" => phi3(&keys, &shape)?,
        _ => json!({
            "hidden_act": "silu",
            "sliding_window": keys.integer("attention.sliding_window")?,
        }),
    };
    if let (Value::Object(config), Value::Object(own)) = (&mut config, own) {
        config.extend(own);
    }
    Ok(config)
}

/// The sizes that the rest depends on.
struct Shape {
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
    /// The dimensions of a head that are rotated.
    rotary: usize,
}

impl Shape {
    /// The defaults are llama.cpp's own.
    fn read(keys: &Keys) -> Result<Self> {
        let (hidden, heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
        let kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(heads);
        let key_length = keys.optional_size("attention.key_length")?;
        let head_dim = key_length.unwrap_or(hidden / heads);
        let value_length = keys.optional_size("attention.value_length")?.unwrap_or(head_dim);
        let rotary = keys.optional_size("rope.dimension_count")?.unwrap_or(head_dim);
        if value_length != head_dim {
            return Err(Error::unsupported(
                format!("a value head of {value_length} dimensions"),
                format!("the key head has {head_dim}"),
            ));
        }
        if rotary != head_dim && keys.architecture != "phi3" {
            return Err(Error::unsupported(
                format!("rotating {rotary} dimensions of a head of {head_dim}"),
                format!("{} rotates whole heads", keys.architecture),
            ));
        }
        Ok(Self { hidden, heads, kv_heads, head_dim, layers: keys.size("block_count")?, rotary })
    }

    /// `query_pre_attn_scalar`, which no key tells. As in llama.cpp, only the 27B models, known by
    /// their number of layers, do not scale by the head.
    fn query_scalar(&self, layers_of_27b: usize) -> usize {
        if self.layers == layers_of_27b {
            self.hidden / self.heads
        } else {
            self.head_dim
        }
    }
}

/// No layer has a sliding window: neither the converter nor llama.cpp knows one.
fn qwen(keys: &Keys, shape: &Shape) -> Result<Value> {
    let qwen2 = keys.architecture == "qwen2";
    // candle applies qwen2's window without asking `use_sliding_window`
    let window = if qwen2 { Some(keys.size("context_length")?) } else { None };
    Ok(json!({
        "hidden_act": "silu",
        "max_window_layers": shape.layers,
        "sliding_window": window,
        "use_sliding_window": false,
    }))
}

/// The defaults are llama.cpp's own.
fn gemma2(keys: &Keys, shape: &Shape) -> Result<Value> {
    Ok(json!({
        "attn_logit_softcapping": keys.float("attn_logit_softcapping")?.unwrap_or(50.),
        "final_logit_softcapping": keys.float("final_logit_softcapping")?.unwrap_or(30.),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.query_scalar(46),
        "sliding_window": keys.optional_size("attention.sliding_window")?.unwrap_or(4096),
    }))
}

/// The defaults are llama.cpp's own.
fn gemma3(keys: &Keys, shape: &Shape) -> Result<Value> {
    Ok(json!({
        "attn_logit_softcapping": null,
        "final_logit_softcapping": keys.float("final_logit_softcapping")?,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.query_scalar(62),
        "rope_local_base_freq": keys.float("rope.freq_base_swa")?.unwrap_or(10_000.),
        "sliding_window": keys.size("attention.sliding_window")?,
        "sliding_window_pattern": keys.sliding_window_pattern()?.unwrap_or(6),
    }))
}

fn phi3(keys: &Keys, shape: &Shape) -> Result<Value> {
    // the converter writes "no window" as 0
    let window = keys.integer("attention.sliding_window")?.filter(|window| *window > 0);
    let original = keys.optional_size("rope.scaling.original_context_length")?;
    Ok(json!({
        "hidden_act": "silu",
        "original_max_position_embeddings": original.unwrap_or(keys.size("context_length")?),
        "partial_rotary_factor": shape.rotary as f64 / shape.head_dim as f64,
        "sliding_window": window,
    }))
}
