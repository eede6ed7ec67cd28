//! A `VarBuilder` over quantised tensors in memory.

use crate::base::cache::Cache;
use crate::base::quantized::stays_quantized;
use crate::base::source::{from_source, Source, Wanted};
use crate::base::split_experts::ExpertPart;
use crate::layers::binding::placeholder::{placeholder, Placeholder};
use crate::{Error, Result};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::collections::HashMap;
use std::sync::Arc;

/// A `VarBuilder` over tensors in memory, by their names: for models whose names
/// [`File::var_builder`](super::File::var_builder) does not know.
///
/// Matrices stay quantised, but for those in F32: a model gets a placeholder, as from
/// [`File::var_builder`](super::File::var_builder). All other tensors have the given dtype. On devices, and for a model
/// in half precision, F16 and BF16 matrices are dense, too. An expert's matrix that is not there is the part of a fused tensor,
/// as by [`split_experts`](crate::base::split_experts), in blocks of its own.
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
    from_source(Memory { tensors, matrices: Cache::default() }, dtype, device)
}

struct Memory {
    tensors: HashMap<String, Arc<QTensor>>,
    matrices: Cache<(String, DType), Placeholder>,
}

impl Memory {
    fn holds(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor, or an expert's part of a fused one.
    fn stored(&self, name: &str, wanted: &Wanted) -> Result<Arc<QTensor>> {
        if let Some(part) = ExpertPart::find(name, |name| self.holds(name)) {
            let dims = |name: &str| Some(self.tensors.get(name)?.shape().dims().to_vec());
            let fused = &self.tensors[&part.fused];
            return Ok(Arc::new(part.of_blocks(name, fused, wanted, dims)?));
        }
        let stored = self.tensors.get(name).cloned();
        stored.ok_or_else(|| Error::tensor(name, "there is no such tensor"))
    }
}

impl Source for Memory {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let stored = self.stored(name, wanted)?;
        let dims = stored.shape().dims();
        wanted.check(name, dims)?;
        if !stays_quantized(stored.dtype(), dims, wanted) {
            return Ok(stored.dequantize(wanted.device)?.to_dtype(wanted.dtype)?);
        }
        let (at, device) = (stored.device().location(), wanted.device.location());
        if at != device {
            return Err(Error::tensor(name, format!("it is on {at:?}, the model on {device:?}")));
        }
        let key = (name.to_owned(), wanted.dtype);
        let matrix = self.matrices.get(key, || Ok(placeholder(stored.clone(), wanted.dtype)?))?;
        Ok(matrix.tensor.clone())
    }

    fn has(&self, name: &str) -> bool {
        self.holds(name) || ExpertPart::find(name, |name| self.holds(name)).is_some()
    }
}
