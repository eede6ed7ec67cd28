//! Decoders of text with a mixture of experts.

use crate::harness::{config, forward, ids, model, Forward};
use crate::language::tiny;
use candle::Result;
use loralib::nn::VarBuilder;
use serde_json::{json, Value};

// The routers' copies are mended: see `build.rs`.
const EXPERTS: [&str; 6] = ["gate", "q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"];

/// Every layer has experts, two of three for a token.
fn experts(more: Value) -> Value {
    let mut keys = tiny(json!({
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

model!(qwen2_moe, EXPERTS, |m, vb| {
    let cfg: m::Config = config(experts(json!({})))?;
    let mut model = m::Model::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});

model!(qwen3_moe, EXPERTS, |m, vb| {
    let cfg: m::Config = config(experts(json!({})))?;
    let mut model = m::ModelForCausalLM::new(&cfg, vb)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, 0)
    })
});

// With all three experts for a token: a finite step along the router's factors changes which are the first two.
model!(mixtral, ["gate", "q_proj", "v_proj", "w1", "w2", "w3"], |m, vb, flash| {
    let cfg: m::Config =
        config(experts(json!({ "use_flash_attn": flash, "num_experts_per_tok": 3 })))?;
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
