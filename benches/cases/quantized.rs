//! Linear layers over quantised weights, beside the same layer over the dequantised weight and, for one
//! token in evaluation, beside candle's own quantised product, which has no backward.

use super::{adapter, case, config, device, forward, rand, step, var, Case};
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor};
use lora::LoraModule;
use loralib as lora;
use std::sync::Arc;

const FORMATS: [GgmlDType; 8] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

const D: usize = 1024;
const R: usize = 8;

#[derive(Clone)]
struct Quantized(QMatMul);

impl Module for Quantized {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

pub fn quantized() -> Result<Vec<Case>> {
    let mut cases = vec![];
    for format in FORMATS {
        let weight = rand(&[D, D], DType::F32)?.to_device(&Device::Cpu)?;
        let weight = Arc::new(QTensor::quantize_onto(&weight, format, device())?);
        let dense = candle_nn::Linear::new(weight.dequantize(device())?, None);
        let vb = adapter(DType::F32);
        let mut ours = lora::Linear::quantized(weight.clone(), None, config(R), vb.clone())?;
        let dense = lora::Linear::new(dense, config(R), vb)?;
        for m in [32, 256, 1024] {
            let x = var(&[m, D], DType::F32)?;
            let name = |what: &str| format!("Quantized {format:?} {m}x{D} r {R} {what}");
            let beside = |run| vec![("F32 base", run)];
            let data = x.detach();
            cases.push(case(
                name("forward"),
                forward(&ours, &data),
                beside(forward(&dense, &data)),
            ));
            cases.push(case(name("step"), step(&ours, &x)?, beside(step(&dense, &x)?)));
        }
        ours.eval()?;
        let token = rand(&[1, D], DType::F32)?;
        let candle = Quantized(QMatMul::from_arc(weight)?);
        let others = vec![
            ("F32 base", forward(&dense, &token)),
            ("candle's QMatMul", forward(&candle, &token)),
        ];
        cases.push(case(
            format!("Quantized {format:?} 1x{D} r {R} evaluation"),
            forward(&ours, &token),
            others,
        ));
    }
    Ok(cases)
}
