//! Models of speech and sound.

use crate::harness::{config, forward, ids, input, model, Forward};
use candle::{Device, Result, Tensor};
use loralib::nn::VarBuilder;
use serde_json::json;

const WHISPER: [&str; 8] =
    ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "conv1", "conv2"];

model!(whisper, WHISPER, F32, |m, vb| {
    let cfg: m::Config = config(json!({
        "num_mel_bins": 8,
        "max_source_positions": 8,
        "d_model": 32,
        "encoder_attention_heads": 4,
        "encoder_layers": 1,
        "vocab_size": 40,
        "max_target_positions": 16,
        "decoder_attention_heads": 4,
        "decoder_layers": 1,
        "suppress_tokens": [],
    }))?;
    let mut model = m::model::Whisper::load(&vb, cfg)?;
    let sound = input((2, 8, 16), &vb)?;
    forward(move || {
        let sound = model.encoder.forward(&sound, true)?;
        let hidden = model.decoder.forward(&ids(2, 7)?, &sound, true)?;
        model.decoder.final_linear(&hidden)
    })
});

const MIMI: [&str; 8] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "input_proj", "output_projs.0"];

// The transformer alone; behind its quantiser there is no gradient. One sound: candle's own Linear is wrong
// for a transposed batch on the CPU.
model!(mimi, MIMI, |m, vb| {
    let cfg = m::transformer::Config {
        d_model: 32,
        num_heads: 4,
        num_layers: 2,
        causal: true,
        norm_first: true,
        bias_ff: false,
        bias_attn: false,
        layer_scale: Some(0.01),
        positional_embedding: m::transformer::PositionalEmbedding::Rope,
        use_conv_block: false,
        cross_attention: false,
        conv_kernel_size: 3,
        use_conv_bias: true,
        gating: None,
        norm: m::NormType::LayerNorm,
        context: 16,
        max_period: 1000,
        max_seq_len: 64,
        kv_repeat: 1,
        dim_feedforward: 48,
        conv_layout: true,
    };
    let sound = input((1, 24, 7), &vb)?;
    forward(move || {
        let mut model = m::transformer::ProjectedTransformer::new(24, &[20], &cfg, vb.clone())?;
        Ok(model.forward(&sound)?.remove(0))
    })
});

const PARLER: [&str; 8] =
    ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "embed_tokens.1", "lm_heads.0"];

// The decoder alone.
model!(parler_tts, PARLER, |m, vb| {
    let cfg: m::DecoderConfig = config(json!({
        "vocab_size": 40,
        "max_position_embeddings": 16,
        "num_hidden_layers": 1,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "activation_function": "gelu",
        "hidden_size": 32,
        "scale_embedding": false,
        "num_codebooks": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": false,
        "rope_embeddings": false,
        "rope_theta": 10000.,
    }))?;
    let mut model = m::Decoder::new(&cfg, vb.clone())?;
    let text = input((1, 5, 32), &vb)?;
    forward(move || {
        model.clear_kv_cache();
        let codes = Tensor::from_vec((0..12u32).collect(), (1, 2, 6), &Device::Cpu)?;
        Tensor::cat(&model.forward(&codes, None, None, &text, None, 0)?, 0)
    })
});
