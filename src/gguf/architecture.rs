//! The architectures whose tensors have names of Hugging Face.
//!
//! The names are those of `gguf.get_tensor_name_map` in gguf-py, the tables of llama.cpp's converter.

use crate::{Error, Result};

/// Names of a file and of Hugging Face.
pub(super) type Pair = (&'static str, &'static str);

/// How the tensors of an architecture are named and stored.
pub(super) struct Architecture {
    pub name: &'static str,
    /// Hugging Face's model type and class.
    pub model: (&'static str, &'static str),
    /// The tensors of a transformer layer, without the names of the layer.
    pub layer: &'static [&'static [Pair]],
    /// Whether a file may have a head of its own.
    pub head: bool,
    /// Whether the rows of q and k are interleaved in each head.
    pub interleaved: bool,
    /// Whether norms are stored as the factor 1 + w.
    pub norms_plus_one: bool,
}

/// The tensors outside of the layers.
pub(super) const MODEL: [Pair; 2] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
];
/// A head of its own.
pub(super) const HEAD: Pair = ("output.weight", "lm_head.weight");

const ATTENTION: &[Pair] = &[
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
];
const ATTENTION_BIAS: &[Pair] = &[
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
];
const ATTENTION_NORMS: &[Pair] = &[
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
];
const MLP: &[Pair] = &[
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];
const NORMS: &[Pair] = &[
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
];
/// Of Gemma 2 and 3, whose norms are before and after.
const FOUR_NORMS: &[Pair] = &[
    ("attn_norm.weight", "input_layernorm.weight"),
    ("post_attention_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
    ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
];
/// Of Phi 3, where q, k and v are one tensor, and so are gate and up.
const FUSED: &[Pair] = &[
    ("attn_qkv.weight", "self_attn.qkv_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_up.weight", "mlp.gate_up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];

const PLAIN: Architecture = Architecture {
    name: "",
    model: ("", ""),
    layer: &[ATTENTION, MLP, NORMS],
    head: true,
    interleaved: false,
    norms_plus_one: false,
};
const GEMMA: Architecture = Architecture { head: false, norms_plus_one: true, ..PLAIN };

const ARCHITECTURES: [Architecture; 7] = [
    // Mistral's files too.
    Architecture {
        name: "llama",
        model: ("llama", "LlamaForCausalLM"),
        interleaved: true,
        ..PLAIN
    },
    Architecture {
        name: "qwen2",
        model: ("qwen2", "Qwen2ForCausalLM"),
        layer: &[ATTENTION, ATTENTION_BIAS, MLP, NORMS],
        ..PLAIN
    },
    Architecture {
        name: "qwen3",
        model: ("qwen3", "Qwen3ForCausalLM"),
        layer: &[ATTENTION, ATTENTION_NORMS, MLP, NORMS],
        ..PLAIN
    },
    Architecture { name: "gemma", model: ("gemma", "GemmaForCausalLM"), ..GEMMA },
    Architecture {
        name: "gemma2",
        model: ("gemma2", "Gemma2ForCausalLM"),
        layer: &[ATTENTION, MLP, FOUR_NORMS],
        ..GEMMA
    },
    Architecture {
        name: "gemma3",
        model: ("gemma3_text", "Gemma3ForCausalLM"),
        layer: &[ATTENTION, ATTENTION_NORMS, MLP, FOUR_NORMS],
        head: true,
        ..GEMMA
    },
    Architecture {
        name: "phi3",
        model: ("phi3", "Phi3ForCausalLM"),
        layer: &[FUSED, NORMS],
        ..PLAIN
    },
];

impl Architecture {
    /// The architecture of this name.
    pub fn find(name: &str) -> Result<&'static Self> {
        const ALL: &[Architecture] = &ARCHITECTURES;
        ALL.iter().find(|known| known.name == name).ok_or_else(|| {
            let names = ARCHITECTURES.map(|known| known.name).join(", ");
            Error::unsupported(
                format!("the GGUF architecture {name:?}"),
                format!("the known ones are {names}; for others there is `gguf::var_builder`"),
            )
        })
    }

    /// All tensors of a layer.
    pub fn layer(&self) -> impl Iterator<Item = &'static Pair> {
        self.layer.iter().copied().flatten()
    }
}
