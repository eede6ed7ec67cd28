//! Base weights for any model: a tensor of fixed pseudo-random values for each name and shape.

use candle::quantized::{GgmlDType, QTensor};
use candle::{bail, DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// The tensors that a model has asked for. A clone has the same.
#[derive(Clone, Default)]
pub struct Weights(Arc<Mutex<HashMap<String, Tensor>>>);

impl Weights {
    pub fn var_builder(&self, dtype: DType) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, Device::Cpu)
    }

    /// The tensors as blocks: matrices of layers in F16, which has no smallest width, all else and what has one of
    /// the `dense` names in F32.
    pub fn quantized(&self, dense: &[&str]) -> Result<HashMap<String, Arc<QTensor>>> {
        let tensors = self.0.lock().unwrap();
        let quantize = |(name, tensor): (&String, &Tensor)| {
            let dense = dense.iter().any(|part| name.contains(part));
            let matrix = tensor.rank() == 2 && name.ends_with("weight") && !dense;
            let dtype = if matrix { GgmlDType::F16 } else { GgmlDType::F32 };
            Ok((name.clone(), Arc::new(QTensor::quantize(tensor, dtype)?)))
        };
        tensors.iter().filter(|(_, tensor)| tensor.rank() > 0).map(quantize).collect()
    }
}

impl SimpleBackend for Weights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        _: &Device,
    ) -> Result<Tensor> {
        let mut tensors = self.0.lock().unwrap();
        if !tensors.contains_key(name) {
            tensors.insert(name.to_owned(), weight(&shape, name, init)?);
        }
        let tensor = &tensors[name];
        if tensor.shape() != &shape {
            bail!("{name} is {:?}, expected {shape:?}", tensor.shape())
        }
        tensor.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        match self.0.lock().unwrap().get(name) {
            Some(tensor) => tensor.to_dtype(dtype),
            None => bail!("no {name}"),
        }
    }

    /// Optional tensors that no model has asked for are not there.
    fn contains_tensor(&self, name: &str) -> bool {
        self.0.lock().unwrap().contains_key(name)
    }
}

fn weight(shape: &Shape, name: &str, init: Init) -> Result<Tensor> {
    let one = matches!(init, Init::Const(one) if one == 1.);
    let gain = ["weight", "gamma", "scale"].iter().any(|end| name.ends_with(end));
    match shape.dims() {
        // Gains of norms, variances, scales.
        [] => random(name, shape, 0.1)? + 1.,
        _ if one => random(name, shape, 0.1)? + 1.,
        [_] if gain => random(name, shape, 0.1)? + 1.,
        [_] => random(name, shape, 0.1),
        dims => random(name, shape, (dims[0] as f64 / shape.elem_count() as f64).sqrt()),
    }
}

/// Values with a mean of 0 and a standard deviation of `std`, in F32, the same for each name and shape.
pub fn random(name: &str, shape: &Shape, std: f64) -> Result<Tensor> {
    // FNV-1a, then a step of SplitMix64 for each value.
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let width = std * 12f64.sqrt();
    let values = (0..shape.elem_count()).map(|_| ((uniform() - 0.5) * width) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}
