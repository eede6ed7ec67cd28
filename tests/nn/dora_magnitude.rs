//! The magnitude of a new layer with DoRA: the norms of the base, whenever that is loaded.

use crate::common::{difference, rnd};
use crate::dora::CFG;
use candle_core::{DType, Device, Module, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use loralib as lora;
use loralib::{LoraConfig, Result};

/// With a weight that is a variable too, in every orientation.
#[test]
fn a_weight_that_is_loaded_later_gives_the_norms() -> Result<()> {
    let transposed = LoraConfig { fan_in_fan_out: true, ..CFG };
    let boxed = |vb: VarBuilder, layer: &str| -> candle_core::Result<Box<dyn Module>> {
        Ok(match layer {
            "linear" => Box::new(lora::linear(6, 5, CFG, vb)?),
            "transposed" => Box::new(lora::linear(6, 5, transposed, vb)?),
            "square" => Box::new(lora::linear(6, 6, transposed, vb)?),
            "embedding" => Box::new(lora::embedding(7, 5, CFG, vb)?),
            _ => Box::new(lora::conv1d(6, 5, 3, Default::default(), CFG, vb)?),
        })
    };
    for (layer, dims) in [
        ("linear", &[2, 6][..]),
        ("transposed", &[2, 6]),
        ("square", &[2, 6]),
        ("embedding", &[2]),
        ("conv", &[2, 6, 9]),
    ] {
        let vars = VarMap::new();
        let module = boxed(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu), layer)?;
        let x = match layer {
            "embedding" => Tensor::new(&[3u32, 6], &Device::Cpu)?,
            _ => rnd(1, dims, DType::F32)?,
        };
        let mut tensors = lora::utils::StateDict::new();
        for (i, (name, var)) in vars.data().lock().unwrap().iter().enumerate() {
            tensors.insert(name.clone(), rnd(2 + i as u64, var.dims(), DType::F32)?);
        }
        let fresh = |tensors: &lora::utils::StateDict, with_lora: bool| {
            let own = tensors.iter().filter(|(name, _)| with_lora || !name.contains("lora"));
            let map = VarMap::new();
            for (name, t) in own {
                let var = candle_core::Var::from_tensor(t)?;
                map.data().lock().unwrap().insert(name.clone(), var);
            }
            boxed(VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu), layer)?.forward(&x)
        };
        let of_base = tensors.clone().into_iter().filter(|(name, _)| !name.contains("lora"));
        let _ = lora::load_state_dict(&vars, &of_base.collect(), lora::Strict::Yes)?;
        let apart = difference(&module.forward(&x)?, &fresh(&tensors, false)?)?;
        assert!(apart < 2e-6, "{layer}, a new adapter: {apart}");
        let _ = lora::load_state_dict(&vars, &tensors, lora::Strict::No)?;
        let apart = difference(&module.forward(&x)?, &fresh(&tensors, true)?)?;
        assert!(apart < 2e-6, "{layer}, a trained one: {apart}");
    }
    Ok(())
}

/// A backend that gives new tensors, which are no variables.
struct Drawn;

impl SimpleBackend for Drawn {
    fn get(
        &self,
        shape: Shape,
        _: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(init.var(shape, dtype, device)?.as_tensor().detach())
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("no {name}")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        false
    }
}

#[test]
fn a_magnitude_that_is_no_variable_is_initialised_too() -> Result<()> {
    let base = candle_nn::Linear::new(rnd(1, &[5, 6], DType::F32)?, None);
    let vb = VarBuilder::from_backend(Box::new(Drawn), DType::F32, Device::Cpu);
    let x = rnd(2, &[3, 6], DType::F32)?;
    let y = lora::Linear::new(base.clone(), CFG, vb)?.forward(&x)?;
    assert!(difference(&y, &base.forward(&x)?)? < 2e-6);
    Ok(())
}

#[test]
fn an_output_of_zeros_is_refused_also_again() -> Result<()> {
    let w = rnd(1, &[5, 6], DType::F32)?
        .slice_assign(&[2..3, 0..6], &Tensor::zeros((1, 6), DType::F32, &Device::Cpu)?)?;
    let vars = VarMap::new();
    for _ in 0..2 {
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let base = candle_nn::Linear::new(w.clone(), None);
        let error = lora::Linear::new(base, CFG, vb).unwrap_err().to_string();
        assert!(error.contains("output 2") && error.contains("use_dora"), "{error}");
    }
    Ok(())
}

/// In a trained adapter: where W is zero, W + ΔW need not be.
#[test]
fn an_output_of_zeros_that_the_update_changes_has_a_direction() -> Result<()> {
    let transposed = LoraConfig { fan_in_fan_out: true, ..CFG };
    for (dims, layer) in [([5, 7], "linear"), ([7, 5], "transposed"), ([7, 5], "embedding")] {
        let (rows, columns) = if layer == "linear" { (2..3, 0..7) } else { (0..7, 2..3) };
        let zeros = Tensor::zeros((rows.len(), columns.len()), DType::F32, &Device::Cpu)?;
        let w = rnd(1, &dims, DType::F32)?.slice_assign(&[rows, columns], &zeros)?;
        let built = |changed: bool| -> Result<()> {
            let b = rnd(3, &[5, CFG.r], DType::F32)?;
            let zero = Tensor::zeros((1, CFG.r), DType::F32, &Device::Cpu)?;
            let b = if changed { b } else { b.slice_assign(&[2..3, 0..CFG.r], &zero)? };
            let tensors = [
                ("lora_A", rnd(2, &[CFG.r, 7], DType::F32)?),
                ("lora_B", b),
                ("lora_magnitude_vector", rnd(4, &[5], DType::F32)?),
            ];
            let tensors = tensors.map(|(name, t)| (name.to_owned(), t)).into();
            let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
            let w = w.clone();
            match layer {
                "embedding" => {
                    let base = candle_nn::Embedding::new(w, 5);
                    lora::Embedding::new(base, CFG, vb).map(drop)
                }
                "linear" => lora::Linear::new(candle_nn::Linear::new(w, None), CFG, vb).map(drop),
                _ => lora::Linear::new(candle_nn::Linear::new(w, None), transposed, vb).map(drop),
            }?;
            Ok(())
        };
        built(true)?;
        let error = built(false).unwrap_err().to_string();
        assert!(error.contains("output 2") && error.contains("use_dora"), "{layer}: {error}");
    }
    Ok(())
}
