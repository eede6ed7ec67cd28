//! Models that generate images by diffusion.

use crate::harness::{config, forward, input, model, Forward};
use candle::{DType, Device, Result, Tensor};
use loralib::nn::VarBuilder;
use serde_json::json;

const UNET: [&str; 8] =
    ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "time_emb_proj", "conv1", "conv_shortcut"];

model!(stable_diffusion, UNET, |m, vb, flash| {
    let block = |out_channels, use_cross_attn| m::unet_2d::BlockConfig {
        out_channels,
        use_cross_attn,
        attention_head_dim: 2,
    };
    let cfg = m::unet_2d::UNet2DConditionModelConfig {
        blocks: vec![block(64, Some(1)), block(64, None)],
        layers_per_block: 1,
        cross_attention_dim: 24,
        ..Default::default()
    };
    let model = m::unet_2d::UNet2DConditionModel::new(vb.clone(), 4, 4, flash, cfg)?;
    let (image, text) = (input((1, 4, 8, 8), &vb)?, input((1, 5, 24), &vb)?);
    forward(move || model.forward(&image, 7., &text))
});

const PRIOR: [&str; 9] = [
    "projection",
    "cond_mapper.0",
    "depthwise",
    "channelwise.0",
    "mapper",
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
];

// The prior alone. It divides by values near 0.
model!(wuerstchen, PRIOR, F32, |m, vb, flash| {
    let model = m::prior::WPrior::new(4, 32, 24, 16, 1, 4, flash, vb.clone())?;
    let (image, text) = (input((1, 4, 6, 6), &vb)?, input((1, 5, 24), &vb)?);
    let time = (input(1, &vb)?.abs()? * 0.1)?;
    forward(move || model.forward(&image, &time, &text)?.clamp(-10., 10.))
});

const FLUX: [&str; 9] =
    ["img_in", "txt_in", "in_layer", "qkv", "proj", "img_mlp.0", "linear1", "linear2", "linear"];

model!(flux, FLUX, |m, vb| {
    use m::WithForward;
    let cfg = m::model::Config {
        in_channels: 8,
        vec_in_dim: 12,
        context_in_dim: 24,
        hidden_size: 32,
        mlp_ratio: 2.,
        num_heads: 2,
        depth: 1,
        depth_single_blocks: 1,
        axes_dim: vec![4, 6, 6],
        theta: 10_000,
        qkv_bias: true,
        guidance_embed: false,
    };
    let model = m::model::Flux::new(&cfg, vb.clone())?;
    let (image, text) = (input((1, 6, 8), &vb)?, input((1, 5, 24), &vb)?);
    let (image_ids, text_ids) = (input((1, 6, 3), &vb)?, input((1, 5, 3), &vb)?);
    let (time, y) = (input(1, &vb)?, input((1, 12), &vb)?);
    forward(move || model.forward(&image, &image_ids, &text, &text_ids, &time, &y, None))
});

// The blocks alone: the embedding of the time is in F16, whatever the weights are in.
model!(mmdit, ["qkv", "proj", "fc1", "fc2", "adaLN_modulation.1", "linear"], |m, vb, flash| {
    let model = m::model::MMDiTCore::new(2, 32, 4, 2, 4, flash, vb.clone())?;
    let (image, text) = (input((1, 9, 32), &vb)?, input((1, 5, 32), &vb)?);
    let time = input((1, 32), &vb)?;
    forward(move || model.forward(&text, &image, &time, None))
});

const Z_IMAGE: [&str; 9] =
    ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "cap_embedder.1", "adaLN_modulation.0"];

model!(z_image, Z_IMAGE, |m, vb, flash| {
    let cfg: m::transformer::Config = config(json!({
        "in_channels": 4,
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [32, 16, 16],
        "use_accelerated_attn": flash,
    }))?;
    let model = m::transformer::ZImageTransformer2DModel::new(&cfg, vb.clone())?;
    let (image, text) = (input((1, 4, 1, 8, 8), &vb)?, input((1, 5, 24), &vb)?);
    let time = input(1, &vb)?.abs()?;
    let mask = Tensor::ones((1, 5), DType::U8, &Device::Cpu)?;
    forward(move || model.forward(&image, &time, &text, &mask))
});
