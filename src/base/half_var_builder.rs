//! A `VarBuilder` that leaves half-precision matrices as they are stored.

use super::cache::Cache;
use super::quantized::stays_quantized;
use super::safetensors_var_builder::Safetensors;
use super::source::{from_source, Source, Wanted};
use crate::layers::binding::placeholder::{placeholder, Placeholder};
use crate::Result;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use safetensors::tensor::{Dtype, View};
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

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
/// let base = loralib::base::half_var_builder("SmolLM2-135M", DType::F32, &Device::Cpu)?;
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
    let half = Half { files: Safetensors::open(path.as_ref())?, matrices: Cache::default() };
    Ok(from_source(half, dtype, device))
}

struct Half {
    files: Safetensors,
    /// The matrices that stay as they are: one that two layers share has the same values.
    matrices: Cache<(String, DType), Placeholder>,
}

impl Source for Half {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let info = self.files.info(name, wanted)?;
        let stored = match info.dtype {
            Dtype::F16 => GgmlDType::F16,
            Dtype::BF16 => GgmlDType::BF16,
            _ => return self.files.tensor(name, wanted),
        };
        if !stays_quantized(stored, &info.shape, wanted) {
            return self.files.tensor(name, wanted);
        }
        let matrix = self.matrices.get((name.to_owned(), wanted.dtype), || {
            let bytes = Cow::Owned(self.files.read(name)?.data().into_owned());
            let storage = QStorage::from_data(bytes, wanted.device, stored)?;
            let blocks = QTensor::new(storage, info.shape.as_slice())?;
            Ok(placeholder(Arc::new(blocks), wanted.dtype)?)
        })?;
        Ok(matrix.tensor.clone())
    }

    fn has(&self, name: &str) -> bool {
        self.files.has(name)
    }
}
