//! A base weight as it is stored: dense, or quantised behind a placeholder.

use super::registry::{Bound, Registry};
use crate::ops::{Matrix, Quantized};
use candle_core::quantized::QTensor;
use candle_core::{bail, DType, Device, Result, Tensor};
use std::sync::Arc;

static BLOCKS: Registry<QTensor> = Registry::new();

/// The blocks of a placeholder. They are found while this lives.
pub(super) type Blocks = Arc<Bound<QTensor>>;

/// The tensor that stands for a quantised matrix, with its blocks.
#[derive(Clone)]
pub(crate) struct Placeholder {
    pub tensor: Tensor,
    _blocks: Blocks,
}

/// A placeholder for a matrix in a model of `dtype`.
pub(crate) fn placeholder(blocks: Arc<QTensor>, dtype: DType) -> Result<Placeholder> {
    let dims = blocks.shape().dims2()?;
    let nan = Tensor::full(f32::NAN, (), &blocks.device())?.to_dtype(dtype)?;
    let tensor = nan.broadcast_as(dims)?;
    Ok(Placeholder { _blocks: BLOCKS.bind(&tensor, blocks), tensor })
}

/// `view`, of the same values as `tensor`, as a placeholder of the same blocks if that is one.
pub(super) fn placeholder_view(tensor: &Tensor, view: &Tensor) -> Option<Blocks> {
    Some(BLOCKS.bind(view, BLOCKS.get(tensor)?.value().clone()))
}

/// Whether this is a placeholder, maybe of blocks that are gone: a matrix of a single value, NaN.
fn is_placeholder(tensor: &Tensor) -> Result<bool> {
    if tensor.stride() != [0, 0] || tensor.elem_count() == 0 {
        return Ok(false);
    }
    let value = tensor.get(0)?.get(0)?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
    Ok(value.is_nan())
}

/// `tensor` on a device, which a placeholder cannot change.
pub(crate) fn on_device(tensor: Tensor, device: &Device) -> Result<Tensor> {
    if !tensor.device().same_device(device) && is_placeholder(&tensor)? {
        bail!(
            "a quantised weight is on {:?} and the model on {:?}: give the base's `VarBuilder` the device",
            tensor.device().location(),
            device.location()
        )
    }
    tensor.to_device(device)
}

/// The values of the weight that `tensor` is a placeholder for, or `tensor` itself.
pub(crate) fn dequantized(tensor: Tensor) -> Result<Tensor> {
    Base::new(tensor).dense()
}

/// The base weight of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    tensor: Tensor,
    /// The blocks, if the tensor is their placeholder.
    blocks: Option<Blocks>,
}

impl Base {
    pub fn new(tensor: Tensor) -> Self {
        let blocks = BLOCKS.get(&tensor);
        Self { tensor, blocks }
    }

    /// The tensor, or the placeholder.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub fn blocks(&self) -> Option<&Arc<QTensor>> {
        self.blocks.as_ref().map(|blocks| blocks.value())
    }

    /// The weight as the operand of a product.
    pub fn matrix(&self) -> Result<Matrix> {
        match self.blocks() {
            Some(blocks) => {
                Ok(Matrix::Quantized(Quantized::new(blocks.clone(), self.tensor.dtype())))
            }
            None if is_placeholder(&self.tensor)? => bail!(
                "the quantised weight {:?} is gone: its `VarBuilder` was dropped before the layer was built",
                self.tensor.dims()
            ),
            None => Ok(Matrix::Dense(self.tensor.clone())),
        }
    }

    /// The values in the dtype of the model.
    pub fn dense(&self) -> Result<Tensor> {
        match self.matrix()? {
            Matrix::Dense(tensor) => Ok(tensor),
            Matrix::Quantized(quantized) => quantized.dequantize(),
        }
    }

    /// The same weight without a graph.
    pub fn detach(&self) -> Self {
        Self { tensor: self.tensor.detach(), blocks: self.blocks.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::GgmlDType;

    #[test]
    fn an_entry_lives_as_long_as_its_owners() -> Result<()> {
        let weight = Tensor::ones((2, 32), DType::F32, &Device::Cpu)?;
        let blocks = Arc::new(QTensor::quantize(&weight, GgmlDType::Q8_0)?);
        let placeholder = placeholder(blocks.clone(), DType::F32)?;
        let tensor = placeholder.tensor.clone();
        let base = Base::new(tensor.clone());
        drop(placeholder);
        assert!(Base::new(tensor.clone()).blocks().is_some(), "the layer has it");
        drop(base);
        assert_eq!(Arc::strong_count(&blocks), 1);
        assert!(!BLOCKS.has(&tensor));
        assert!(Base::new(tensor).matrix().is_err());
        Ok(())
    }
}
