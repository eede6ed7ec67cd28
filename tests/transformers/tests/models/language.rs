//! Decoders of text with attention.

use crate::harness::{config, forward, ids, model, Forward};
use candle::Result;
use loralib::nn::VarBuilder;
use serde_json::{json, Value};

const LLAMA: [&str; 8] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"];
/// For a head that is tied to the embedding.
const TIED: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A config.json with `more` keys.
pub fn tiny(more: Value) -> Value {
    let mut keys = json!({
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "attention_bias": false,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
        "layer_norm_eps": 1e-5,
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.,
        "tie_word_embeddings": false,
        "max_window_layers": 2,
        "sliding_window": 8,
        "use_sliding_window": false,
        "use_flash_attn": false,
        "use_cache": true,
    });
    let more = more.as_object().into_iter().flatten();
    keys.as_object_mut().unwrap().extend(more.map(|(key, value)| (key.clone(), value.clone())));
    keys
}

model!(llama, LLAMA, |m, vb, flash| {
    let cfg = config::<m::LlamaConfig>(tiny(json!({})))?.into_config(flash);
    let model = m::Llama::load(vb.clone(), &cfg)?;
    let mut cache = m::Cache::new(false, vb.dtype(), &cfg, vb.device())?;
    forward(move || model.forward(&ids(2, 7)?, 0, &mut cache))
});

model!(llama2_c, LLAMA, F32, |m, vb| {
    let cfg = m::Config {
        dim: 32,
        hidden_dim: 48,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        vocab_size: 40,
        seq_len: 16,
        norm_eps: 1e-5,
    };
    let mut cache = m::Cache::new(false, &cfg, vb.pp("rot"))?;
    let model = m::Llama::load(vb, cfg)?;
    forward(move || model.forward(&ids(2, 7)?, 0, &mut cache))
});

model!(granite, LLAMA, |m, vb, flash| {
    let cfg = config::<m::GraniteConfig>(tiny(json!({})))?.into_config(flash);
    let model = m::Granite::load(vb.clone(), &cfg)?;
    let mut cache = m::Cache::new(false, vb.dtype(), &cfg, vb.device())?;
    forward(move || model.forward(&ids(2, 7)?, 0, &mut cache))
});

/// A decoder from config.json whose cache can be cleared.
macro_rules! decoder {
    ($name:ident, $targets:expr, $model:ident, $config:ident, $more:tt $(, $flash:ident)?) => {
        model!($name, $targets, |m, vb $(, $flash)?| {
            #[allow(unused_mut)]
            let mut cfg: m::$config = config(tiny(json!($more)))?;
            $(cfg.use_flash_attn = $flash;)?
            let mut model = m::$model::new(&cfg, vb)?;
            forward(move || {
                model.clear_kv_cache();
                model.forward(&ids(2, 7)?, 0)
            })
        });
    };
}

decoder!(mistral, LLAMA, Model, Config, {}, flash);
decoder!(helium, LLAMA, Model, Config, { "bos_token_id": 1, "eos_token_id": 2, "mlp_bias": false }, flash);
decoder!(olmo, LLAMA, Model, Config, { "clip_qkv": 2. });
decoder!(olmo2, LLAMA, Model, Config, {});
decoder!(phi3, PHI3, Model, Config, {});

const PHI3: [&str; 5] = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens"];
model!(starcoder2, STARCODER2, |m, vb| {
    let cfg: m::Config = config(tiny(json!({ "use_bias": true })))?;
    let mut model = m::Model::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});

const STARCODER2: [&str; 6] = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"];

const HYBRID: [&str; 6] = ["q_proj", "k_proj", "v_proj", "o_proj", "input_linear", "output_linear"];

model!(granitemoehybrid, HYBRID, |m, vb, flash| {
    let cfg: m::GraniteMoeHybridConfig = config(tiny(json!({
        "layer_types": ["attention", "attention"],
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.,
    })))?;
    let cfg = cfg.into_config(flash);
    let model = m::GraniteMoeHybrid::load(vb.clone(), &cfg)?;
    let mut cache = m::GraniteMoeHybridCache::new(false, vb.dtype(), &cfg, vb.device())?;
    forward(move || model.forward(&ids(2, 7)?, 0, &mut cache))
});

model!(qwen2, LLAMA, |m, vb| {
    // Without it the head is tied to the embedding.
    vb.get((40, 32), "lm_head.weight")?;
    let cfg: m::Config = config(tiny(json!({})))?;
    let mut model = m::ModelForCausalLM::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});

model!(qwen3, LLAMA, F32, |m, vb| {
    let cfg: m::Config = config(tiny(json!({})))?;
    let mut model = m::ModelForCausalLM::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});

model!(smol, LLAMA, |m, vb| {
    let cfg: m::smollm3::Config = config(tiny(json!({ "no_rope_layer_interval": 2 })))?;
    let mut model = m::smollm3::ModelForCausalLM::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});

model!(phi, ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "embed_tokens"], |m, vb| {
    let more = json!({ "partial_rotary_factor": 0.5, "qk_layernorm": false, "hidden_act": "gelu" });
    let cfg: m::Config = config(tiny(more))?;
    let mut model = m::Model::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?)
    })
});

/// The branch of flash attention is gemma's alone: gemma2's leaves out the softcap, and gemma3's the window.
macro_rules! gemma {
    ($name:ident, $more:tt $(, $flash:ident)?) => {
        model!($name, TIED, |m, vb $(, $flash)?| {
            let cfg: m::Config = config(tiny(json!($more)))?;
            let mut model = m::Model::new(false $(|| $flash)?, &cfg, vb)?;
            forward(move || {
                model.clear_kv_cache();
                model.forward(&ids(2, 7)?, 0)
            })
        });
    };
}

gemma!(gemma, { "hidden_act": null, "hidden_activation": "gelu" }, flash);
gemma!(gemma2, {
    "hidden_activation": "gelu",
    "final_logit_softcapping": 30.,
    "attn_logit_softcapping": 50.,
    "query_pre_attn_scalar": 8,
});
// candle's cache does not take the keys of several heads.
gemma!(gemma3, {
    "num_key_value_heads": 1,
    "hidden_activation": "gelu",
    "final_logit_softcapping": null,
    "attn_logit_softcapping": null,
    "query_pre_attn_scalar": 8,
    "rope_local_base_freq": 1000.,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
});

model!(stable_lm, LLAMA, |m, vb, flash| {
    let more =
        json!({ "partial_rotary_factor": 0.5, "use_qkv_bias": true, "use_flash_attn": flash });
    let cfg: m::Config = config(tiny(more))?;
    forward(move || m::Model::new(&cfg, vb.clone())?.forward(&ids(2, 7)?, 0))
});

model!(falcon, GLM, |m, vb| {
    let cfg = m::Config {
        vocab_size: 40,
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        ..Default::default()
    };
    let mut model = m::Falcon::load(vb, cfg)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(1, 7)?)
    })
});

model!(bigcode, ["c_attn", "c_proj", "c_fc"], F32, |m, vb| {
    let cfg = m::Config {
        vocab_size: 40,
        max_position_embeddings: 16,
        num_hidden_layers: 2,
        hidden_size: 32,
        layer_norm_epsilon: 1e-5,
        n_inner: Some(48),
        num_attention_heads: 4,
        multi_query: true,
        use_cache: false,
    };
    let mut model = m::GPTBigCode::load(vb, cfg)?;
    forward(move || model.forward(&ids(2, 7)?, 0))
});

model!(mixformer, ["wte", "Wqkv", "out_proj", "fc1", "fc2"], |m, vb| {
    let cfg: m::Config = config(json!({
        "vocab_size": 40,
        "n_positions": 16,
        "n_embd": 32,
        "n_layer": 2,
        "n_inner": 48,
        "n_head": 4,
        "rotary_dim": 4,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": false,
        "pad_vocab_size_multiple": 8,
    }))?;
    let mut model = m::MixFormerSequentialForCausalLM::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?)
    })
});

const GLM: [&str; 5] =
    ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings"];

/// ChatGLM's Config has no serde.
macro_rules! glm {
    ($name:ident, $dtype:ident $(, $field:ident: $value:expr)*) => {
        model!($name, GLM, $dtype, |m, vb| {
            let cfg = m::Config {
                num_layers: 2,
                padded_vocab_size: 40,
                hidden_size: 32,
                ffn_hidden_size: 48,
                kv_channels: 8,
                num_attention_heads: 4,
                seq_length: 16,
                layernorm_epsilon: 1e-5,
                rmsnorm: true,
                apply_residual_connection_post_layernorm: false,
                post_layer_norm: true,
                add_bias_linear: false,
                add_qkv_bias: true,
                bias_dropout_fusion: true,
                multi_query_attention: true,
                multi_query_group_num: 2,
                apply_query_key_layer_scaling: true,
                attention_softmax_in_fp32: false,
                fp32_residual_connection: false,
                $($field: $value,)*
            };
            let mut model = m::Model::new(&cfg, vb)?;
            forward(move || {
                model.reset_kv_cache();
                model.forward(&ids(2, 7)?)
            })
        });
    };
}

glm!(chatglm, F32);
glm!(codegeex4_9b, F64, rope_ratio: 1);
glm!(glm4, F64, rope_ratio: 1, eos_token_id: None);

model!(glm4_new, PHI3_SPLIT, |m, vb| {
    let cfg: m::Config = config(tiny(json!({ "partial_rotary_factor": 0.5 })))?;
    let mut model = m::ModelForCausalLM::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(1, 7)?, 0)
    })
});

const PHI3_SPLIT: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens"];
