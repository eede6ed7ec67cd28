//! Decoders of text with a mixture of experts.

use crate::harness::{config, forward, ids, model, Forward};
use crate::language::tiny;
use candle::Result;
use loralib::nn::VarBuilder;
use serde_json::{json, Value};

// Three of these models read the router's weights to the host, which cuts the graph: the router has no
// gradient, and what comes before it has a wrong one. Their only layer's experts come after it.
const EXPERTS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Every layer has experts, two of three for a token.
fn experts(more: Value) -> Value {
    let mut keys = tiny(json!({
        "num_hidden_layers": 1,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "num_experts": 3,
        "num_local_experts": 3,
        "norm_topk_prob": true,
    }));
    let more = more.as_object().into_iter().flatten();
    keys.as_object_mut().unwrap().extend(more.map(|(key, value)| (key.clone(), value.clone())));
    keys
}

model!(qwen2_moe, EXPERTS, F32, |m, vb| {
    let cfg: m::Config = config(experts(json!({})))?;
    let mut model = m::Model::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});

model!(qwen3_moe, EXPERTS, F32, |m, vb| {
    let cfg: m::Config = config(experts(json!({})))?;
    let mut model = m::ModelForCausalLM::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});

model!(mixtral, ["w1", "w2", "w3"], F32, |m, vb, flash| {
    let cfg: m::Config = config(experts(json!({ "use_flash_attn": flash })))?;
    forward(move || m::Model::new(&cfg, vb.clone())?.forward(&ids(2, 7)?, 0))
});

const DEEPSEEK: [&str; 9] = [
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
];

model!(deepseek2, DEEPSEEK, |m, vb| {
    let cfg: m::DeepSeekV2Config = config(experts(json!({
        "num_hidden_layers": 2,
        "norm_topk_prob": false,
        "n_shared_experts": 1,
        "n_routed_experts": 3,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "kv_lora_rank": 12,
        "v_head_dim": 8,
        "qk_nope_head_dim": 4,
        "n_group": 1,
        "topk_group": 1,
    })))?;
    let mut model = m::DeepSeekV2::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});
