//! Encoders of text, and encoders with decoders.

use crate::harness::{config, forward, ids, input, model, Forward};
use candle::{DType, Device, Result, Tensor};
use loralib::nn::VarBuilder;
use serde_json::{json, Value};

/// A config.json with the keys of BERT and its relatives.
fn bert() -> Value {
    json!({
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 0,
    })
}

/// All tokens count.
fn mask() -> Result<Tensor> {
    Tensor::ones((2, 7), DType::U32, &Device::Cpu)
}

fn types() -> Result<Tensor> {
    Tensor::zeros((2, 7), DType::U32, &Device::Cpu)
}

const BERT: [&str; 7] = [
    "query",
    "key",
    "value",
    "dense",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
];

model!(bert, BERT, |m, vb| {
    let model = m::BertModel::load(vb, &config(bert())?)?;
    forward(move || model.forward(&ids(2, 7)?, &types()?, Some(&mask()?)))
});

model!(jina_bert, ["query", "key", "value", "dense", "gated_layers", "wo"], F32, |m, vb| {
    let mut keys = bert();
    keys["position_embedding_type"] = json!("alibi");
    let model = m::BertModel::new(vb, &config(keys)?)?;
    forward(move || ids(2, 7)?.apply(&model))
});

model!(nomic_bert, ["Wqkv", "out_proj", "fc11", "fc12", "fc2", "word_embeddings"], |m, vb| {
    let cfg = config(json!({
        "vocab_size": 40,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_inner": 48,
        "n_positions": 16,
        "type_vocab_size": 2,
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_fraction": 1.,
        "rotary_emb_base": 1000.,
        "rotary_emb_interleaved": false,
        "qkv_proj_bias": false,
        "mlp_fc1_bias": false,
        "mlp_fc2_bias": false,
        "activation_function": "swiglu",
        "prenorm": false,
    }))?;
    let model = m::NomicBertModel::load(vb, &cfg)?;
    forward(move || model.forward(&ids(2, 7)?, None, Some(&mask()?)))
});

model!(distilbert, ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"], F32, |m, vb| {
    let cfg = config(json!({
        "vocab_size": 40,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "activation": "gelu",
        "max_position_embeddings": 16,
        "initializer_range": 0.02,
        "pad_token_id": 0,
    }))?;
    let model = m::DistilBertModel::load(vb, &cfg)?;
    // 1 hides a position.
    let mask = Tensor::zeros((7, 7), DType::U8, &Device::Cpu)?;
    forward(move || model.forward(&ids(2, 7)?, &mask))
});

model!(xlm_roberta, BERT, F32, |m, vb| {
    let mut keys = bert();
    keys["position_embedding_type"] = json!("absolute");
    let model = m::XLMRobertaModel::new(&config(keys)?, vb)?;
    forward(move || model.forward(&ids(2, 7)?, &mask()?, &types()?, None, None, None))
});

model!(modernbert, ["Wqkv", "Wi", "Wo", "tok_embeddings"], F32, |m, vb| {
    let mut keys = bert();
    let more = json!({
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 10000.,
        "local_attention": 4,
        "local_rope_theta": 1000.,
    });
    keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let model = m::ModernBert::load(vb, &config(keys)?)?;
    forward(move || model.forward(&ids(2, 7)?, &mask()?))
});

const DEBERTA: [&str; 5] = ["query_proj", "key_proj", "value_proj", "dense", "word_embeddings"];

model!(debertav2, DEBERTA, F32, |m, vb| {
    let mut keys = bert();
    let more = json!({
        "relative_attention": true,
        "max_relative_positions": -1,
        "position_biased_input": false,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "share_att_key": true,
        "norm_rel_ebd": "layer_norm",
    });
    keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let model = m::DebertaV2Model::load(vb, &config(keys)?)?;
    forward(move || model.forward(&ids(2, 7)?, Some(types()?), Some(mask()?)))
});

const STELLA: [&str; 6] =
    ["qkv_proj", "o_proj", "up_gate_proj", "down_proj", "word_embeddings", "linear"];

model!(stella_en_v5, STELLA, F32, |m, vb| {
    let cfg: m::Config = config(json!({
        "variant": "Small",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "rope_theta": 1000.,
        "embed_head": { "in_features": 32, "out_features": 24 },
        "norm_eps": 1e-5,
        "activation_fn": "gelu",
        "num_key_value_heads": 4,
        "type_vocab_size": 2,
        "scaling_factor": 2.,
    }))?;
    let mut model = m::EmbeddingModel::new(&cfg, vb.pp("base"), vb.pp("embed"))?;
    forward(move || model.forward(&ids(2, 7)?, &mask()?))
});

// Its linear layers are its own.
model!(t5, ["embed_tokens", "relative_attention_bias"], F32, |m, vb| {
    let cfg: m::Config = config(json!({
        "vocab_size": 40,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.,
        "feed_forward_proj": "gated-gelu",
        "is_decoder": false,
        "is_encoder_decoder": true,
        "use_cache": false,
        "tie_word_embeddings": false,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }))?;
    let mut model = m::T5ForConditionalGeneration::load(vb, &cfg)?;
    forward(move || {
        model.clear_kv_cache();
        model.forward(&ids(2, 7)?, &ids(2, 5)?)
    })
});

model!(marian, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], F32, |m, vb| {
    let cfg: m::Config = config(json!({
        "vocab_size": 40,
        "max_position_embeddings": 16,
        "encoder_layers": 1,
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_layers": 1,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "use_cache": false,
        "is_encoder_decoder": true,
        "activation_function": "swish",
        "d_model": 32,
        "decoder_start_token_id": 0,
        "scale_embedding": true,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "forced_eos_token_id": 1,
        "share_encoder_decoder_embeddings": true,
    }))?;
    let mut model = m::MTModel::new(&cfg, vb)?;
    forward(move || {
        model.reset_kv_cache();
        let encoded = model.encoder().forward(&ids(2, 7)?, 0)?;
        model.decode(&ids(2, 5)?, &encoded, 0)
    })
});

model!(blip_text, ["query", "key", "value", "dense", "word_embeddings"], F32, |m, vb| {
    let mut keys = bert();
    keys["encoder_hidden_size"] = json!(24);
    keys["projection_dim"] = json!(32);
    keys["is_decoder"] = json!(true);
    let mut model = m::TextLMHeadModel::new(&config(keys)?, vb.clone())?;
    let image = input((1, 4, 24), &vb)?;
    forward(move || {
        model.reset_kv_cache();
        model.forward(&ids(1, 7)?, &image)
    })
});
