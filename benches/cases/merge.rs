//! `eval()`, beside the least that it could cost.

use super::{adapter, case, config, device, rand, Case, Run};
use candle_core::{DType, Result};
use lora::LoraModule;
use loralib as lora;

pub fn merge() -> Result<Vec<Case>> {
    let (d, r) = (4096, 16);
    let w = rand(&[d, d], DType::F32)?;
    let base = candle_nn::Linear::new(w.clone(), None);
    let mut ours = lora::Linear::new(base, config(r), adapter(DType::F32))?;
    let (a, b) = (rand(&[r, d], DType::F32)?, rand(&[d, r], DType::F32)?);
    let floor = move || {
        std::hint::black_box((w.copy()?, b.matmul(&a)?));
        device().synchronize()
    };
    let eval = move || {
        ours.eval()?;
        device().synchronize()
    };
    let group = format!("merge {d}x{d} r {r}");
    let others: Vec<(&str, Run)> = vec![("a copy of W, and B·A", Box::new(floor))];
    Ok(vec![case(group, Box::new(eval), others)])
}
