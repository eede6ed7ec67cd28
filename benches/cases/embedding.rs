//! A table, looked up.

use super::{adapter, case, config, device, forward, rand, step, var, Case};
use candle_core::{DType, Result, Tensor};
use loralib as lora;

pub fn embedding() -> Result<Vec<Case>> {
    let (num, dim, r, ids) = (32_000, 512, 8, 2048);
    let x = Tensor::rand(0f32, num as f32, ids, device())?.to_dtype(DType::U32)?;
    let plain = candle_nn::Embedding::new(rand(&[num, dim], DType::F32)?, dim);
    let full = candle_nn::Embedding::new(var(&[num, dim], DType::F32)?, dim);
    let ours = lora::Embedding::new(plain.clone(), config(r), adapter(DType::F32))?;
    let name = |what: &str| format!("Embedding {num}x{dim} r {r} {what}");
    Ok(vec![
        case(
            name("forward"),
            forward(&ours, &x),
            vec![("candle_nn::Embedding", forward(&plain, &x))],
        ),
        case(name("step"), step(&ours, &x)?, vec![("full fine-tuning", step(&full, &x)?)]),
    ])
}
