//! A `VarBuilder` that leaves half-precision matrices as they are stored.

use super::safetensors_var_builder::Disk;
use crate::layers::placeholder;
use crate::Result;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;
use safetensors::tensor::View;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// [`safetensors_var_builder`](crate::safetensors_var_builder) for a model that computes in F32 on the CPU over a base
/// in F16 or BF16, in half of the memory.
///
/// Matrices in F16 or BF16 stay as they are in the file. The layers of [`nn`](crate::nn) and of this crate decode them
/// to `dtype` in parts, forward and backward, as they do the blocks of a [GGUF file](crate::gguf): outputs and
/// gradients are those of weights that were converted whole. `eval()` does not merge such layers. All other tensors are
/// converted; on a GPU, and if the model is in half precision itself, all are.
///
/// A matrix that the model uses without a layer, as by `matmul` on the tensor itself, and one that it transposes,
/// splits or joins before it builds a layer, is a placeholder full of NaN, also in candle's LSTM and GRU: such a model
/// needs [`safetensors_var_builder`](crate::safetensors_var_builder).
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device};
///
/// let base = loralib::half_var_builder("SmolLM2-135M", DType::F32, &Device::Cpu)?;
/// # let _ = base; Ok(()) }
/// ```
///
/// # Errors
/// As [`safetensors_var_builder`](crate::safetensors_var_builder).
pub fn half_var_builder(
    path: impl AsRef<Path>,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    let half = Half { disk: Disk::open(path.as_ref())?, blocks: Mutex::default() };
    Ok(VarBuilder::from_backend(Box::new(half), dtype, device.clone()))
}

struct Half {
    disk: Disk,
    /// What has been read: a matrix that two layers share has the same values.
    blocks: Mutex<HashMap<String, Arc<QTensor>>>,
}

impl Half {
    fn give(
        &self,
        name: &str,
        wanted: Option<&Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let stays = device.is_cpu() && matches!(dtype, DType::F32 | DType::F64);
        if let Some(blocks) = blocks.get(name).filter(|_| stays) {
            if wanted.is_none_or(|wanted| wanted == blocks.shape()) {
                return Ok(placeholder(blocks, dtype)?);
            }
        }
        let tensor = self.disk.read(name, wanted)?;
        let stored = match tensor.dtype() {
            DType::F16 => Some(GgmlDType::F16),
            DType::BF16 => Some(GgmlDType::BF16),
            _ => None,
        };
        let Some(stored) = stored.filter(|_| stays && tensor.rank() == 2) else {
            return Ok(tensor.to_device(device)?.to_dtype(dtype)?);
        };
        let storage = QStorage::from_data(Cow::Owned(tensor.data().into_owned()), device, stored)?;
        let read = Arc::new(QTensor::new(storage, tensor.shape())?);
        blocks.insert(name.to_owned(), read.clone());
        Ok(placeholder(&read, dtype)?)
    }
}

impl SimpleBackend for Half {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        dev: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(self.give(name, Some(&shape), dtype, dev)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        Ok(self.give(name, None, dtype, dev)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.disk.contains_tensor(name)
    }
}
