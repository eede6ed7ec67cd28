//! Decoders of text with a state: linear attention, state spaces and short convolutions.

use crate::harness::{config, forward, ids, model, Forward};
use candle::{Result, Tensor, D};
use loralib::nn::VarBuilder;
use serde_json::json;

model!(mamba, ["in_proj", "x_proj", "dt_proj", "out_proj"], |m, vb| {
    let cfg = m::Config { d_model: 32, n_layer: 2, vocab_size: 40, pad_vocab_size_multiple: 8 };
    let model = m::Model::new(&cfg, vb.clone())?;
    forward(move || {
        let mut state = m::State::new(1, &cfg, vb.dtype(), vb.device())?;
        let step = |column: Result<Tensor>| model.forward(&column?, &mut state);
        let ids = ids(1, 5)?;
        let steps: Result<Vec<_>> =
            (0..5).map(|i| ids.get_on_dim(D::Minus1, i)).map(step).collect();
        Tensor::stack(&steps?, 1)
    })
});

model!(mamba2, ["in_proj", "out_proj"], |m, vb| {
    let cfg: m::Config = config(json!({
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "state_size": 8,
        "expand": 2,
        "head_dim": 16,
        "n_groups": 1,
        "pad_vocab_size_multiple": 8,
    }))?;
    let model = m::Model::new(&cfg, vb.clone())?;
    forward(move || {
        let mut state = m::State::new(2, &cfg, vb.dtype(), vb.device())?;
        model.forward_prefill(&ids(2, 8)?, &mut state, 4)
    })
});

/// RWKV's file and state have the same form in both versions.
macro_rules! rwkv {
    ($name:ident) => {
        model!($name, ["key", "receptance", "value", "gate", "output"], F32, |m, vb| {
            let cfg: m::Config = config(json!({
                "vocab_size": 40,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "attention_hidden_size": 32,
                "num_attention_heads": 8,
                "head_size": 8,
                "layer_norm_epsilon": 1e-5,
                "rescale_every": 0,
            }))?;
            let model = m::Model::new(&cfg, vb.clone())?;
            forward(move || {
                let mut state = m::State::new(1, &cfg, vb.device())?;
                let ids = ids(1, 5)?;
                let step = |i| model.forward(&ids.narrow(1, i, 1)?, &mut state);
                Tensor::cat(&(0..5).map(step).collect::<Result<Vec<_>>>()?, 0)
            })
        });
    };
}

rwkv!(rwkv_v5);
rwkv!(rwkv_v6);

const LFM2: [&str; 9] =
    ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3", "embed_tokens"];

model!(lfm2, LFM2, |m, vb, flash| {
    let cfg: m::Lfm2Config = config(json!({
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
        "max_position_embeddings": 16,
        "block_multiple_of": 16,
    }))?;
    let cfg = cfg.into_config(flash);
    let model = m::Model::new(&cfg, vb.clone())?;
    let mut cache = m::Cache::new(false, vb.dtype(), &cfg, vb.device())?;
    forward(move || model.forward(&ids(2, 7)?, 0, &mut cache))
});

const GRIFFIN: [&str; 10] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "linear_y",
    "linear_x",
    "linear_out",
];

model!(recurrent_gemma, GRIFFIN, |m, vb| {
    let cfg: m::Config = config(json!({
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_window_size": 8,
        "conv1d_width": 4,
        "logits_soft_cap": 30.,
        "hidden_activation": "gelu_pytorch_tanh",
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.,
        "block_types": ["recurrent", "attention"],
        "attention_bias": false,
    }))?;
    forward(move || m::Model::new(&cfg, vb.clone())?.forward(&ids(2, 7)?, 0))
});

const BASED: [&str; 8] =
    ["in_proj", "out_proj", "conv.conv", "proj_q", "proj_k", "proj_v", "Wqkv", "fc1"];

model!(based, BASED, |m, vb| {
    let cfg: m::Config = config(json!({
        "vocab_size": 40,
        "n_embd": 32,
        "n_inner": 64,
        "n_layer": 3,
        "n_head": 4,
        "layer_norm_epsilon": 1e-5,
        "alt_mixer_layers": [1],
        "alt_mixer_2_layers": [2],
        "alt_mixer": { "num_heads": 4, "feature_dim": 4, "feature_map": { "input_dim": 4 } },
        "alt_mixer_2": { "num_heads": 4, "window_size": 8 },
    }))?;
    forward(move || m::Model::new(&cfg, vb.clone())?.forward(&ids(1, 7)?, 0))
});
