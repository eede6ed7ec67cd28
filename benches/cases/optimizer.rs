//! A step of AdamW over the factors of a model: 30 layers with seven adapters of rank 8.

use super::{case, device, rand, Case, Run};
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use loralib::train::AdamW;

pub fn adamw() -> Result<Vec<Case>> {
    let shapes = [[8, 576], [576, 8], [8, 1536], [1536, 8]];
    let vars = (0..420).map(|i| Var::from_tensor(&rand(&shapes[i % 4], DType::F32)?));
    let vars = vars.collect::<Result<Vec<_>>>()?;
    Ok(vec![case(
        "AdamW 420 factors".to_owned(),
        step::<AdamW>(&vars)?,
        vec![("candle_nn::AdamW", step::<candle_nn::AdamW>(&vars)?)],
    )])
}

fn step<O: Optimizer<Config = ParamsAdamW> + 'static>(vars: &[Var]) -> Result<Run> {
    let vars = vars.iter().map(|var| Var::from_tensor(&var.copy()?)).collect::<Result<Vec<_>>>()?;
    let mut grads: GradStore = Tensor::zeros((), DType::F32, device())?.backward()?;
    for var in &vars {
        grads.insert(var, var.as_tensor().copy()?);
    }
    let mut opt = O::new(vars, ParamsAdamW::default())?;
    Ok(Box::new(move || {
        opt.step(&grads)?;
        device().synchronize()
    }))
}
