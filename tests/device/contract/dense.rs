//! The contract for the layers of one matrix: Linear, MergedLinear and Embedding.

use super::{check, check_with_dora, Case};
use crate::common::{device, rnd, CFG};
use candle_core::{DType, Device, Module, Result, Tensor};
use lora::LoraConfig;
use loralib as lora;

/// The output of the merged layer, whose input has 2 to 4 dimensions in candle.
pub fn linear_plain(layer: lora::Linear, x: &Tensor) -> Result<Tensor> {
    let flat = x.reshape(((), x.dims()[x.rank() - 1]))?;
    let y = layer.into_merged()?.forward(&flat)?;
    y.reshape([&x.dims()[..x.rank() - 1], &y.dims()[1..]].concat())
}

#[test]
fn linear() -> Result<()> {
    for (fan_in_fan_out, bias) in [(false, true), (false, false), (true, true), (true, false)] {
        for leading in [&[][..], &[1], &[7], &[2, 3], &[2, 1, 3], &[2, 1, 2, 3]] {
            check_with_dora(&Case {
                name: &format!("Linear, fan_in_fan_out {fan_in_fan_out}, input {leading:?}"),
                weight: if fan_in_fan_out { &[6, 5] } else { &[5, 6] },
                bias: bias.then_some(5),
                input: &rnd(3, &[leading, &[6]].concat(), DType::F64)?,
                cfg: LoraConfig { fan_in_fan_out, ..CFG },
                make: &|cfg, vb| lora::layers::linear_b(6, 5, bias, cfg, vb),
                plain: &linear_plain,
            })?;
        }
    }
    Ok(())
}

#[test]
fn merged_linear() -> Result<()> {
    let masks: [&[bool]; 6] = [
        &[true, false, true],
        &[false, true, false],
        &[true, true, true],
        &[true],
        &[false, false, true],
        &[false, false, false],
    ];
    for enable in masks {
        for fan_in_fan_out in [false, true] {
            check(&Case {
                name: &format!("MergedLinear {enable:?}, fan_in_fan_out {fan_in_fan_out}"),
                weight: if fan_in_fan_out { &[4, 9] } else { &[9, 4] },
                bias: fan_in_fan_out.then_some(9),
                input: &rnd(3, &[2, 3, 4], DType::F64)?,
                cfg: LoraConfig { fan_in_fan_out, ..CFG },
                make: &|cfg, vb| {
                    if fan_in_fan_out {
                        lora::merged_linear(4, 9, enable, cfg, vb)
                    } else {
                        lora::merged_linear_no_bias(4, 9, enable, cfg, vb)
                    }
                },
                plain: &|layer, x| layer.into_merged()?.forward(x),
            })?;
        }
    }
    Ok(())
}

#[test]
fn merged_linear_with_unequal_splits() -> Result<()> {
    check(&Case {
        name: "MergedLinear with splits",
        weight: &[10, 4],
        bias: Some(10),
        input: &rnd(3, &[3, 4], DType::F64)?,
        cfg: CFG,
        make: &|cfg, vb| {
            let base = candle_nn::linear(4, 10, vb.clone())?;
            lora::MergedLinear::with_splits(base, &[(6, true), (2, false), (2, true)], cfg, vb)
        },
        plain: &|layer, x| layer.into_merged()?.forward(x),
    })
}

#[test]
fn embedding() -> Result<()> {
    for dtype in [DType::U8, DType::U32, DType::I32, DType::I64] {
        // A GPU does not convert to or from I32.
        let ids = Tensor::new(&[[0u32, 10, 3], [3, 3, 7]], &Device::Cpu)?.to_dtype(dtype)?;
        check_with_dora(&Case {
            name: &format!("Embedding of {dtype:?}"),
            weight: &[11, 6],
            bias: None,
            input: &ids.to_device(&device())?,
            cfg: CFG,
            make: &|cfg, vb| lora::embedding(11, 6, cfg, vb),
            plain: &|layer, _| {
                layer.into_merged()?.forward(&ids.to_dtype(DType::I64)?.to_device(&device())?)
            },
        })?;
    }
    Ok(())
}
