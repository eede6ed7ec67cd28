//! A layer's base weight, as it is stored: dense, or quantised.
//!
//! Model code and `VarBuilder` handle [`Tensor`]s alone, so a quantised weight passes through them as a
//! placeholder: a tensor of its shape, whose values are NaN and take no memory. The layer that is built
//! around the placeholder finds the blocks by its id, and so does one that is built around another layer's
//! `weight()`, as a tied head is.

use crate::ops::{Matrix, Quantized};
use candle_core::quantized::QTensor;
use candle_core::{bail, DType, Device, Result, Tensor, TensorId};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

/// The blocks of placeholders. They live as long as a `VarBuilder` or a layer holds them. Ids are never
/// reused, and stay, so that a placeholder whose blocks are gone is known as such.
static BLOCKS: LazyLock<Mutex<HashMap<TensorId, Weak<QTensor>>>> = LazyLock::new(Default::default);

/// A placeholder for a quantised matrix in a model of `dtype`.
pub(crate) fn placeholder(blocks: &Arc<QTensor>, dtype: DType) -> Result<Tensor> {
    let dims = blocks.shape().dims2()?;
    let nan = Tensor::full(f32::NAN, (1, 1), &blocks.device())?.to_dtype(dtype)?;
    let placeholder = nan.broadcast_as(dims)?;
    register(&placeholder, blocks);
    Ok(placeholder)
}

/// Makes `other`, a view of `placeholder`, a placeholder for the same blocks if that is one.
pub(crate) fn alias_quantized(placeholder: &Tensor, other: &Tensor) {
    if let Some(Some(blocks)) = blocks(placeholder) {
        register(other, &blocks);
    }
}

/// `tensor` on a device, which a placeholder cannot change.
pub(crate) fn on_device(tensor: Tensor, device: &Device) -> Result<Tensor> {
    if !tensor.device().same_device(device) && blocks(&tensor).is_some() {
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

fn register(placeholder: &Tensor, blocks: &Arc<QTensor>) {
    let mut registry = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    registry.insert(placeholder.id(), Arc::downgrade(blocks));
}

/// `None` if it is no placeholder, and `Some(None)` if its blocks are gone.
fn blocks(tensor: &Tensor) -> Option<Option<Arc<QTensor>>> {
    let registry = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    registry.get(&tensor.id()).map(Weak::upgrade)
}

#[derive(Debug, Clone)]
pub(crate) struct Base {
    tensor: Tensor,
    stored: Stored,
}

#[derive(Debug, Clone)]
enum Stored {
    /// In the tensor.
    Dense,
    /// The tensor is their placeholder.
    Quantized(Arc<QTensor>),
    /// The tensor was a placeholder.
    Gone,
}

impl Base {
    pub fn new(tensor: Tensor) -> Self {
        let stored = match blocks(&tensor) {
            None => Stored::Dense,
            Some(Some(blocks)) => Stored::Quantized(blocks),
            Some(None) => Stored::Gone,
        };
        Self { tensor, stored }
    }

    /// The tensor, or the placeholder.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub fn blocks(&self) -> Option<&Arc<QTensor>> {
        match &self.stored {
            Stored::Quantized(blocks) => Some(blocks),
            Stored::Dense | Stored::Gone => None,
        }
    }

    /// The weight as the operand of a product.
    pub fn matrix(&self) -> Result<Matrix> {
        match &self.stored {
            Stored::Dense => Ok(Matrix::Dense(self.tensor.clone())),
            Stored::Quantized(blocks) => Ok(Matrix::Quantized(self.quantized(blocks))),
            Stored::Gone => bail!(
                "the quantised weight {:?} is gone: its `VarBuilder` was dropped before the layer was built",
                self.tensor.dims()
            ),
        }
    }

    /// The values in the dtype of the model.
    pub fn dense(&self) -> Result<Tensor> {
        match self.matrix()? {
            Matrix::Dense(tensor) => Ok(tensor),
            Matrix::Quantized(quantized) => quantized.dequantize(),
        }
    }

    fn quantized(&self, blocks: &Arc<QTensor>) -> Quantized {
        Quantized::new(blocks.clone(), self.tensor.dtype())
    }

    /// The same weight without a graph.
    pub fn detach(&self) -> Self {
        match &self.stored {
            Stored::Dense => Self { tensor: self.tensor.detach(), stored: Stored::Dense },
            Stored::Quantized(_) | Stored::Gone => self.clone(),
        }
    }
}

/// The tensor of a weight that cannot be quantised.
pub(super) fn expect_dense(weight: Matrix) -> Result<Tensor> {
    match weight {
        Matrix::Dense(weight) => Ok(weight),
        Matrix::Quantized(_) => bail!("a convolution's kernel cannot be quantised"),
    }
}
