//! A `VarBuilder` over quantised tensors in memory.

use crate::layers::placeholder;
use crate::Error;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{bail, DType, Device, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;
use std::collections::HashMap;
use std::sync::Arc;

/// A `VarBuilder` over tensors in memory, by their names: for models whose names
/// [`File::var_builder`](super::File::var_builder) does not know.
///
/// Matrices stay quantised, but for those in F32: a model gets a placeholder, as from
/// [`File::var_builder`](super::File::var_builder). All other tensors have the given dtype.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::quantized::{GgmlDType, QTensor};
/// use candle_core::{DType, Device, Tensor};
/// use std::{collections::HashMap, sync::Arc};
/// let weight = Tensor::ones((4, 32), DType::F32, &Device::Cpu)?;
/// let weight = Arc::new(QTensor::quantize(&weight, GgmlDType::Q8_0)?);
/// let tensors = HashMap::from([("up.weight".to_owned(), weight)]);
/// let vb = loralib::gguf::var_builder(tensors, DType::F32, &Device::Cpu);
/// let up = loralib::nn::linear_no_bias(32, 4, vb.pp("up"))?;
/// # let _ = up; Ok(()) }
/// ```
pub fn var_builder(
    tensors: HashMap<String, Arc<QTensor>>,
    dtype: DType,
    device: &Device,
) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(Memory(tensors)), dtype, device.clone())
}

/// Whether a model gets a placeholder for this tensor. On devices candle decodes F16 and BF16 on the host.
pub(super) fn stays_quantized(dtype: GgmlDType, dims: &[usize], device: &Device) -> bool {
    let blocks = match dtype {
        GgmlDType::F32 => false,
        GgmlDType::F16 | GgmlDType::BF16 => device.is_cpu(),
        _ => true,
    };
    dims.len() == 2 && blocks
}

struct Memory(HashMap<String, Arc<QTensor>>);

impl SimpleBackend for Memory {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        dev: &Device,
    ) -> candle_core::Result<Tensor> {
        if let Some(own) = self.0.get(name).map(|own| own.shape()).filter(|own| **own != shape) {
            return Err(wrong_shape(name, own.dims(), &shape).into());
        }
        self.get_unchecked(name, dtype, dev)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        let Some(own) = self.0.get(name) else {
            return Err(Error::tensor(name, "there is no such tensor").into());
        };
        if !stays_quantized(own.dtype(), own.shape().dims(), dev) {
            return own.dequantize(dev)?.to_dtype(dtype);
        }
        let (at, wanted) = (own.device().location(), dev.location());
        if at != wanted {
            bail!("tensor {name:?}: it is on {at:?}, the model on {wanted:?}")
        }
        placeholder(own, dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

pub(super) fn wrong_shape(name: &str, own: &[usize], wanted: &Shape) -> Error {
    Error::tensor(name, format!("its shape is {own:?}, the model expects {:?}", wanted.dims()))
}
