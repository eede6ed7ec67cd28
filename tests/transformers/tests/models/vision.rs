//! Models of images, and of images and text.

use crate::harness::{config, forward, ids, input, model, Forward};
use candle::{Module, Result, Tensor};
use loralib::nn::VarBuilder;
use serde_json::{json, Value};

/// A config.json with the keys of a ViT.
fn vit() -> Value {
    json!({
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "image_size": 16,
        "patch_size": 8,
        "num_channels": 3,
        "qkv_bias": true,
    })
}

model!(vit, ["query", "key", "value", "dense", "projection", "classifier"], |m, vb| {
    let model = m::Model::new(&config(vit())?, 10, vb.clone())?;
    let image = input((2, 3, 16, 16), &vb)?;
    forward(move || model.forward(&image))
});

/// A vision transformer with a fixed image size.
macro_rules! transformer {
    ($name:ident, $model:ident, $targets:expr, $dim:expr, $size:expr) => {
        model!($name, $targets, |m, vb| {
            let model = m::$model::new(vb.clone(), 1, $dim, 2)?;
            let image = input((1, 3, $size, $size), &vb)?;
            forward(move || model.forward(&image))
        });
    };
}

const DINO: [&str; 5] = ["qkv", "proj", "fc1", "fc2", "head"];

// The position embeddings are interpolated, from a grid of 37.
transformer!(dinov2, DinoVisionTransformer, DINO, 32, 28);
transformer!(dinov2reg4, DinoVisionTransformer, DINO, 32, 518);
transformer!(beit, BeitVisionTransformer, DINO, 16, 384);
transformer!(eva2, EVA2VisionTransformer, EVA2, 128, 448);

const EVA2: [&str; 6] = ["q_proj", "k_proj", "v_proj", "proj", "fc1_g", "fc2"];

model!(convnext, ["stages.0.blocks.1.conv_dw", "stages.3.blocks.1.mlp.fc1", "stem.0"], |m, vb| {
    let model = m::convnext(&m::Config::atto(), 10, vb.clone())?;
    let image = input((1, 3, 32, 32), &vb)?;
    forward(move || model.forward(&image))
});

model!(
    efficientnet,
    ["features.1.0.block.0.0", "features.7.0.block.2.fc1", "classifier.1"],
    |m, vb| {
        let model = m::EfficientNet::new(vb.clone(), m::MBConvConfig::b0(), 10)?;
        let image = input((1, 3, 32, 32), &vb)?;
        forward(move || model.forward(&image))
    }
);

// The gradient does not reach its stem's max_pool2d, which has no backward for these sizes.
model!(resnet, ["layer4.1.conv1", "layer4.0.downsample.0", "fc"], |m, vb| {
    let model = m::resnet18(10, vb.clone())?;
    let image = input((1, 3, 32, 32), &vb)?;
    forward(move || model.forward(&image))
});

const SEGFORMER: [&str; 8] =
    ["query", "key", "value", "sr", "dense", "dense1", "dwconv.dwconv", "proj"];

model!(segformer, SEGFORMER, |m, vb| {
    let cfg: m::Config = config(json!({
        "id2label": { "0": "a", "1": "b" },
        "num_channels": 3,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "decoder_hidden_size": 32,
    }))?;
    let model = m::SemanticSegmentationModel::new(&cfg, 2, vb.clone())?;
    let image = input((1, 3, 32, 32), &vb)?;
    forward(move || model.forward(&image))
});

const SIGLIP: [&str; 8] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "self_attn.out_proj",
    "fc1",
    "fc2",
    "patch_embedding",
    "token_embedding",
];

model!(siglip, SIGLIP, |m, vb| {
    let text = json!({
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    });
    let mut vision = vit();
    vision["num_hidden_layers"] = json!(1);
    let cfg: m::Config = config(json!({ "text_config": text, "vision_config": vision }))?;
    let model = m::Model::new(&cfg, vb.clone())?;
    let image = input((2, 3, 16, 16), &vb)?;
    forward(move || Ok(model.forward(&image, &ids(2, 7)?)?.1))
});

const CLIP: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "fc1",
    "fc2",
    "patch_embedding",
    "token_embedding",
    "text_projection",
];

model!(clip, CLIP, |m, vb| {
    let cfg = m::ClipConfig {
        text_config: m::text_model::ClipTextConfig {
            vocab_size: 40,
            embed_dim: 32,
            activation: m::text_model::Activation::QuickGelu,
            intermediate_size: 48,
            max_position_embeddings: 16,
            pad_with: None,
            num_hidden_layers: 1,
            num_attention_heads: 4,
            projection_dim: 24,
        },
        vision_config: m::vision_model::ClipVisionConfig {
            embed_dim: 32,
            activation: m::text_model::Activation::QuickGelu,
            intermediate_size: 48,
            num_hidden_layers: 1,
            num_attention_heads: 4,
            projection_dim: 24,
            num_channels: 3,
            image_size: 16,
            patch_size: 8,
        },
        logit_scale_init_value: 2.6592,
        image_size: 16,
    };
    // Without it the model draws one.
    vb.pp("vision_model.embeddings").get(32, "class_embedding")?;
    let model = m::ClipModel::new(vb.clone(), &cfg)?;
    let image = input((2, 3, 16, 16), &vb)?;
    forward(move || {
        let text = model.get_text_features(&ids(2, 7)?)?;
        Tensor::cat(&[text, model.get_image_features(&image)?], 0)
    })
});

model!(
    chinese_clip,
    ["query", "dense", "patch_embedding", "fc1", "k_proj", "text_projection"],
    |m, vb| {
        let mut cfg = m::ChineseClipConfig::clip_vit_base_patch16();
        let text = &mut cfg.text_config;
        (text.vocab_size, text.max_position_embeddings) = (40, 16);
        (text.hidden_size, text.intermediate_size) = (32, 48);
        (text.num_hidden_layers, text.num_attention_heads) = (1, 4);
        let vision = &mut cfg.vision_config;
        (vision.hidden_size, vision.intermediate_size) = (32, 48);
        (vision.num_hidden_layers, vision.num_attention_heads) = (1, 4);
        (vision.image_size, vision.patch_size, vision.projection_dim) = (16, 8, 24);
        (cfg.projection_dim, cfg.image_size) = (24, 16);
        // Without it the model draws one.
        vb.pp("vision_model.embeddings").get(32, "class_embedding")?;
        let model = m::ChineseClipModel::new(vb.clone(), &cfg)?;
        let image = input((2, 3, 16, 16), &vb)?;
        forward(move || {
            let text = model.get_text_features(&ids(2, 7)?, None, None)?;
            Tensor::cat(&[text, model.get_image_features(&image)?], 0)
        })
    }
);

model!(pixtral, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "patch_conv"], |m, vb| {
    let mut keys = vit();
    keys["rope_theta"] = json!(1000.);
    let cfg = config(keys)?;
    let model = m::vision_model::Model::new(&cfg, vb.clone())?;
    let image = input((1, 3, 16, 16), &vb)?;
    forward(move || model.forward(&image))
});

// Its queries, keys and values are one tensor without a layer.
model!(openclip, ["out_proj", "c_fc", "c_proj", "token_embedding"], |m, vb| {
    let cfg = m::text_model::Config {
        vocab_size: 40,
        embed_dim: 32,
        intermediate_size: 48,
        max_position_embeddings: 7,
        pad_with: None,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        projection_dim: 24,
    };
    let model = m::text_model::OpenClipTextTransformer::new(vb, &cfg)?;
    forward(move || model.forward(&ids(2, 7)?))
});

model!(
    segment_anything,
    ["qkv", "attn.proj", "lin1", "lin2", "patch_embed.proj", "neck.2"],
    |m, vb| {
        // Its relative positions cut the graph in candle.
        let model = m::image_encoder::ImageEncoderViT::new(
            32,
            8,
            3,
            32,
            2,
            4,
            16,
            true,
            false,
            true,
            2,
            &[1],
            vb.clone(),
        )?;
        let image = input((1, 3, 32, 32), &vb)?;
        forward(move || model.forward(&image))
    }
);

model!(
    blip,
    ["qkv", "projection", "fc1", "fc2", "query", "key", "value", "dense"],
    F32,
    |m, vb| {
        let mut vision = vit();
        vision["projection_dim"] = json!(32);
        let text = json!({
            "vocab_size": 40,
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 48,
            "projection_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "is_decoder": true,
        });
        let cfg: m::Config = config(json!({
            "text_config": text,
            "vision_config": vision,
            "projection_dim": 32,
            "image_text_hidden_size": 32,
        }))?;
        let mut model = m::BlipForConditionalGeneration::new(&cfg, vb.clone())?;
        let image = input((1, 3, 16, 16), &vb)?;
        forward(move || {
            model.reset_kv_cache();
            let image = model.vision_model().forward(&image)?;
            model.text_decoder().forward(&ids(1, 7)?, &image)
        })
    }
);

const TROCR: [&str; 9] =
    ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "query", "value", "projection"];

model!(trocr, TROCR, F32, |m, vb| {
    let decoder: m::TrOCRConfig = config(json!({
        "vocab_size": 40,
        "d_model": 32,
        "cross_attention_hidden_size": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "activation_function": "gelu",
        "max_position_embeddings": 16,
        "dropout": 0.1,
        "attention_dropout": 0.,
        "activation_dropout": 0.,
        "decoder_start_token_id": 2,
        "init_std": 0.02,
        "decoder_layerdrop": 0.,
        "use_cache": false,
        "scale_embedding": true,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_vocab_size": 40,
        "use_learned_position_embeddings": true,
        "tie_word_embeddings": false,
    }))?;
    let mut model = m::TrOCRModel::new(&config(vit())?, &decoder, vb.clone())?;
    let image = input((2, 3, 16, 16), &vb)?;
    forward(move || {
        model.reset_kv_cache();
        // As many tokens as patches: the mask of the one is added to the scores of the other.
        let image = model.encoder().forward(&image)?;
        model.decode(&ids(2, 5)?, &image, 0)
    })
});
