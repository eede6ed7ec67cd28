//! Convolutions in one, two and three dimensions.

use super::{adapter, case, config, forward, rand, step, var, Case};
use candle_core::{DType, Result};
use candle_nn::{Conv1dConfig, Conv2dConfig};
use lora::LoraConfig;
use loralib as lora;

pub fn conv2d() -> Result<Vec<Case>> {
    let mut all = vec![];
    for (c, side) in [(64, 56), (256, 14)] {
        let x = var(&[8, c, side, side], DType::F32)?;
        let cfg = Conv2dConfig { padding: 1, ..Default::default() };
        let plain = candle_nn::Conv2d::new(rand(&[c, c, 3, 3], DType::F32)?, None, cfg);
        let full = candle_nn::Conv2d::new(var(&[c, c, 3, 3], DType::F32)?, None, cfg);
        let ours = lora::Conv2d::new(plain.clone(), config(8), adapter(DType::F32))?;
        let (data, name) = (x.detach(), |what| format!("Conv2d {c} channels {side}x{side} {what}"));
        all.push(case(
            name("forward"),
            forward(&ours, &data),
            vec![("candle_nn::Conv2d", forward(&plain, &data))],
        ));
        let full = vec![("full fine-tuning", step(&full, &x)?)];
        all.push(case(name("step"), step(&ours, &x)?, full));
    }
    Ok(all)
}

pub fn conv1d() -> Result<Vec<Case>> {
    let x = var(&[8, 256, 512], DType::F32)?;
    let cfg = Conv1dConfig { padding: 1, ..Default::default() };
    let plain = candle_nn::Conv1d::new(rand(&[256, 256, 3], DType::F32)?, None, cfg);
    let full = candle_nn::Conv1d::new(var(&[256, 256, 3], DType::F32)?, None, cfg);
    let ours = lora::Conv1d::new(plain.clone(), config(8), adapter(DType::F32))?;
    let (data, name) = (x.detach(), |what| format!("Conv1d 256 channels 512 {what}"));
    let plain = vec![("candle_nn::Conv1d", forward(&plain, &data))];
    Ok(vec![
        case(name("forward"), forward(&ours, &data), plain),
        case(name("step"), step(&ours, &x)?, vec![("full fine-tuning", step(&full, &x)?)]),
    ])
}

/// candle has none: full fine-tuning is that of our own plain layer.
pub fn conv3d() -> Result<Vec<Case>> {
    let x = var(&[2, 32, 16, 16, 16], DType::F32)?;
    let w = var(&[32, 32, 3, 3, 3], DType::F32)?;
    let cfg = lora::layers::Conv3dConfig { padding: 1, ..Default::default() };
    let layer = |w, lora| lora::Conv3d::new(w, None, cfg, lora, adapter(DType::F32));
    let (ours, full) = (layer(w.detach(), config(8))?, layer(w, LoraConfig::default())?);
    let full = vec![("full fine-tuning (ours)", step(&full, &x)?)];
    Ok(vec![case("Conv3d 32 channels 16x16x16 step".into(), step(&ours, &x)?, full)])
}
