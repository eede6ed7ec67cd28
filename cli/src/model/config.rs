//! A model's sizes and kind, from Hugging Face's `config.json`.

use super::rope::Rotary;
use crate::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

/// What the decoder is built from.
#[derive(Debug, Clone)]
pub struct Config {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f64,
    /// How many tokens the model takes.
    pub longest: usize,
    /// Whether the head is the table of the embeddings.
    pub tied: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// Whether queries and keys are normed.
    pub qk_norm: bool,
    /// Phi-3's `qkv_proj` and `gate_up_proj`.
    pub fused: bool,
    /// Gemma's norms, with a gain of 1 + w, and embeddings, times √hidden_size.
    pub gemma: bool,
    /// Whether attention and MLP are normed after them, too (Gemma 2 and 3).
    pub post_norms: bool,
    pub activation: Activation,
    /// What scores are multiplied by.
    pub scale: f64,
    /// The cap of scores and of logits.
    pub softcap: Option<f64>,
    pub logit_softcap: Option<f64>,
    pub layers: Vec<Span>,
    /// The rotation of layers with [`Span::All`], and of the others.
    pub rotary: [Rotary; 2],
}

/// What a layer's queries see of the text before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    All,
    /// So many tokens, their own included.
    Window(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// By its approximation with tanh.
    Gelu,
}

/// The file, of which an option may be missing.
#[derive(Deserialize)]
struct File {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    max_position_embeddings: usize,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(alias = "hidden_activation")]
    hidden_act: Option<String>,
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    #[serde(default)]
    use_bidirectional_attention: Option<bool>,
}

const KNOWN: &str =
    "llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text and phi3 are supported";

impl Config {
    /// An error names the option that is missing, or that is not supported.
    pub fn from_json(mut json: Value) -> Result<Self> {
        // Some files of Gemma have both names of the activation, of which the newer counts.
        if let Some(options) = json.as_object_mut() {
            if options.get("hidden_activation").is_some_and(|act| !act.is_null()) {
                options.remove("hidden_act");
            }
        }
        let file = File::deserialize(&json)?;
        let kind = &file.model_type[..];
        let gemma = matches!(kind, "gemma" | "gemma2" | "gemma3_text");
        if !gemma && !matches!(kind, "llama" | "mistral" | "qwen2" | "qwen3" | "phi3") {
            return Err(format!("model_type is {kind:?}: {KNOWN}").into());
        }
        if file.use_bidirectional_attention == Some(true) {
            return Err("use_bidirectional_attention is true, which is not supported".into());
        }
        let (heads, hidden) = (file.num_attention_heads, file.hidden_size);
        let kv_heads = file.num_key_value_heads.unwrap_or(heads);
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            let message = format!("num_key_value_heads = {kv_heads} does not divide {heads} heads");
            return Err(message.into());
        }
        let head_dim = file.head_dim.unwrap_or(if gemma { 256 } else { hidden / heads });
        let scalar = file.query_pre_attn_scalar.filter(|_| gemma && kind != "gemma");
        let scores = |cap: Option<f64>| cap.filter(|_| kind == "gemma2" || kind == "gemma3_text");
        Ok(Self {
            vocab_size: file.vocab_size,
            hidden_size: hidden,
            intermediate_size: file.intermediate_size,
            heads,
            kv_heads,
            head_dim,
            eps: file.rms_norm_eps,
            longest: file.max_position_embeddings,
            tied: file.tie_word_embeddings.unwrap_or(gemma),
            qkv_bias: file.attention_bias || kind == "qwen2",
            output_bias: file.attention_bias,
            mlp_bias: file.mlp_bias,
            qk_norm: matches!(kind, "qwen3" | "gemma3_text"),
            fused: kind == "phi3",
            gemma,
            post_norms: matches!(kind, "gemma2" | "gemma3_text"),
            activation: activation(file.hidden_act.as_deref(), gemma)?,
            scale: scalar.unwrap_or(head_dim as f64).powf(-0.5),
            softcap: scores(file.attn_logit_softcapping),
            logit_softcap: scores(file.final_logit_softcapping),
            layers: spans(&file)?,
            rotary: rotary(&json, head_dim, file.max_position_embeddings)?,
            model_type: file.model_type,
        })
    }
}

fn activation(name: Option<&str>, gemma: bool) -> Result<Activation> {
    match name {
        None if gemma => Ok(Activation::Gelu),
        None | Some("silu") => Ok(Activation::Silu),
        // Of the first Gemma's files, which mean the approximation.
        Some("gelu") if gemma => Ok(Activation::Gelu),
        Some("gelu_pytorch_tanh") => Ok(Activation::Gelu),
        Some(act) => {
            Err(format!("hidden_act is {act:?}: silu and gelu_pytorch_tanh are supported").into())
        }
    }
}

/// What each layer sees.
fn spans(file: &File) -> Result<Vec<Span>> {
    let (kind, n) = (&file.model_type[..], file.num_hidden_layers);
    let is_qwen = matches!(kind, "qwen2" | "qwen3");
    let slides = file.use_sliding_window.unwrap_or(!is_qwen) && kind != "llama" && kind != "gemma";
    let window = file.sliding_window.filter(|_| slides);
    let has_window = |i: usize| match kind {
        "gemma2" => i.is_multiple_of(2),
        "gemma3_text" => !(i + 1).is_multiple_of(file.sliding_window_pattern.unwrap_or(6)),
        "qwen2" | "qwen3" => i >= file.max_window_layers.unwrap_or(28),
        _ => true,
    };
    let types = file.layer_types.as_ref().filter(|_| slides);
    if let Some(types) = types.filter(|types| types.len() != n) {
        return Err(format!("layer_types has {} entries for {n} layers", types.len()).into());
    }
    let span = |i: usize| {
        let in_window = match types.map(|types| &types[i][..]) {
            None => has_window(i) && window.is_some(),
            Some("sliding_attention") => true,
            Some("full_attention") => false,
            Some(other) => return Err(format!("layer_types has {other:?}").into()),
        };
        match (in_window, window) {
            (false, _) => Ok(Span::All),
            (true, Some(window)) if window > 0 => Ok(Span::Window(window)),
            (true, _) => {
                Err(format!("layer {i} has a window, and there is no sliding_window").into())
            }
        }
    };
    (0..n).map(span).collect()
}

/// The rotations, by the options' older names or by `rope_parameters`.
fn rotary(json: &Value, head_dim: usize, longest: usize) -> Result<[Rotary; 2]> {
    let object = |value: &Value| value.as_object().cloned();
    let given = object(&json["rope_parameters"]).unwrap_or_default();
    let of = |layers: &str, theta: &str, scaled: bool| {
        let mut options = match given.get(layers) {
            Some(own) => object(own).unwrap_or_default(),
            None if given.contains_key("full_attention") => Map::new(),
            None => given.clone(),
        };
        let older = if scaled { object(&json["rope_scaling"]) } else { None };
        older.into_iter().flatten().for_each(|(key, value)| {
            options.entry(key).or_insert(value);
        });
        let beside = [
            ("rope_theta", theta),
            ("partial_rotary_factor", "partial_rotary_factor"),
            ("original_max_position_embeddings", "original_max_position_embeddings"),
        ];
        for (key, name) in beside {
            if !json[name].is_null() {
                options.entry(key).or_insert(json[name].clone());
            }
        }
        Rotary::new(options.into(), head_dim, longest)
    };
    let all = of("full_attention", "rope_theta", true)?;
    // Gemma 3's layers with a window have their own.
    let own = json["model_type"] == "gemma3_text";
    let windows = match own {
        true if given.contains_key("sliding_attention") => {
            of("sliding_attention", "rope_local_base_freq", false)?
        }
        true => local(&json["rope_local_base_freq"], head_dim, longest)?,
        false => all.clone(),
    };
    Ok([all, windows])
}

fn local(theta: &Value, head_dim: usize, longest: usize) -> Result<Rotary> {
    let theta = theta.as_f64().unwrap_or(10_000.);
    Rotary::new(serde_json::json!({ "rope_theta": theta }), head_dim, longest)
}
