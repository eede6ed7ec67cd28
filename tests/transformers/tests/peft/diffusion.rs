//! Stable Diffusion's U-Net.

use crate::{case, check, Case, Config, Forward};

#[test]
fn diffusion() {
    check(&[case!("unet", |vb, _, x| {
        use models::stable_diffusion::unet_2d;
        let block = unet_2d::BlockConfig {
            out_channels: 32,
            use_cross_attn: Some(1),
            attention_head_dim: 2,
        };
        let config = unet_2d::UNet2DConditionModelConfig {
            blocks: vec![block],
            layers_per_block: 1,
            cross_attention_dim: 16,
            ..Default::default()
        };
        let model = unet_2d::UNet2DConditionModel::new(vb, 4, 4, false, config)?;
        model.forward(&x["sample"], 7., &x["encoder_hidden_states"])
    })]);
}
