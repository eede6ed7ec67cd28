//! Encoder-decoders, images and speech.

use crate::{case, check, ids, Case, Config, Forward};
use candle::Result;
use serde_json::Value;

/// candle does not read CLIP's config.json.
fn sizes(config: &Config, part: &str) -> Result<impl Fn(&str) -> usize> {
    let config: Value = config.get()?;
    let part = config[part].clone();
    Ok(move |key: &str| part[key].as_u64().unwrap() as usize)
}

#[test]
fn speech_and_vision() {
    check(&[
        case!("t5", |vb, config, x| {
            use models::t5::T5ForConditionalGeneration;
            let mut model = T5ForConditionalGeneration::load(vb, &config.get()?)?;
            model.forward(&ids(x, "input_ids")?, &ids(x, "decoder_input_ids")?)
        }),
        case!("whisper", |vb, config, x| {
            let mut model = models::whisper::model::Whisper::load(&vb, config.get()?)?;
            let xa = model.encoder.forward(&x["input_features"], true)?;
            let y = model.decoder.forward(&ids(x, "decoder_input_ids")?, &xa, true)?;
            model.decoder.final_linear(&y)
        }),
        case!("vit", |vb, config, x| {
            models::vit::Model::new(&config.get()?, 5, vb)?.forward(&x["pixel_values"])
        }),
        case!("clip", |vb, config, x| {
            use models::clip::text_model::{Activation, ClipTextConfig};
            use models::clip::vision_model::ClipVisionConfig;
            let (text, vision) = (sizes(config, "text_config")?, sizes(config, "vision_config")?);
            let config = models::clip::ClipConfig {
                text_config: ClipTextConfig {
                    vocab_size: text("vocab_size"),
                    embed_dim: text("hidden_size"),
                    activation: Activation::QuickGelu,
                    intermediate_size: text("intermediate_size"),
                    max_position_embeddings: text("max_position_embeddings"),
                    pad_with: None,
                    num_hidden_layers: text("num_hidden_layers"),
                    num_attention_heads: text("num_attention_heads"),
                    projection_dim: text("projection_dim"),
                },
                vision_config: ClipVisionConfig {
                    embed_dim: vision("hidden_size"),
                    activation: Activation::QuickGelu,
                    intermediate_size: vision("intermediate_size"),
                    num_hidden_layers: vision("num_hidden_layers"),
                    num_attention_heads: vision("num_attention_heads"),
                    projection_dim: vision("projection_dim"),
                    num_channels: vision("num_channels"),
                    image_size: vision("image_size"),
                    patch_size: vision("patch_size"),
                },
                logit_scale_init_value: 0.,
                image_size: vision("image_size"),
            };
            let model = models::clip::ClipModel::new(vb, &config)?;
            Ok(model.forward(&x["pixel_values"], &ids(x, "input_ids")?)?.0)
        }),
    ]);
}
