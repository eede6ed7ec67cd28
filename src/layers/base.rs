//! A layer's base weight, as it is stored: dense, or quantised.
//!
//! Model code and `VarBuilder` handle [`Tensor`]s alone, so a quantised weight passes through them as a
//! placeholder: a tensor of its shape, whose values are NaN and take no memory. The layer that is built
//! around the placeholder finds the blocks by its id, and so does one that is built around another layer's
//! `weight()`, as a tied head is.

use crate::ops::{Matrix, Quantized};
use candle_core::quantized::QTensor;
use candle_core::{bail, DType, Result, Tensor, TensorId};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

/// The blocks of placeholders. They live as long as a `VarBuilder` or a layer holds them; ids are never
/// reused.
static BLOCKS: LazyLock<Mutex<HashMap<TensorId, Weak<QTensor>>>> = LazyLock::new(Default::default);

/// A placeholder for a quantised matrix in a model of `dtype`.
pub(crate) fn quantized_handle(blocks: &Arc<QTensor>, dtype: DType) -> Result<Tensor> {
    let dims = blocks.shape().dims2()?;
    let nan = Tensor::full(f32::NAN, (1, 1), &blocks.device())?.to_dtype(dtype)?;
    let handle = nan.broadcast_as(dims)?;
    register(&handle, blocks);
    Ok(handle)
}

/// Makes `other`, a view of `handle`, a placeholder for the same blocks if `handle` is one.
pub(crate) fn alias_quantized(handle: &Tensor, other: &Tensor) {
    if let Some(blocks) = blocks(handle) {
        register(other, &blocks);
    }
}

/// The values of the weight that `tensor` is a placeholder for, or `tensor` itself.
pub(crate) fn dequantized(tensor: Tensor) -> Result<Tensor> {
    Base::new(tensor).dense()
}

fn register(handle: &Tensor, blocks: &Arc<QTensor>) {
    let mut registry = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    registry.retain(|_, blocks| blocks.strong_count() > 0);
    registry.insert(handle.id(), Arc::downgrade(blocks));
}

fn blocks(handle: &Tensor) -> Option<Arc<QTensor>> {
    BLOCKS.lock().unwrap_or_else(PoisonError::into_inner).get(&handle.id())?.upgrade()
}

#[derive(Debug, Clone)]
pub(crate) struct Base {
    tensor: Tensor,
    /// If `tensor` is their placeholder.
    blocks: Option<Arc<QTensor>>,
}

impl Base {
    pub fn new(tensor: Tensor) -> Self {
        Self { blocks: blocks(&tensor), tensor }
    }

    /// The tensor, or the placeholder.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub fn blocks(&self) -> Option<&Arc<QTensor>> {
        self.blocks.as_ref()
    }

    /// The weight as the operand of a product.
    pub fn matrix(&self) -> Matrix {
        match &self.blocks {
            None => Matrix::Dense(self.tensor.clone()),
            Some(blocks) => Matrix::Quantized(self.quantized(blocks)),
        }
    }

    /// The values in the dtype of the model.
    pub fn dense(&self) -> Result<Tensor> {
        match &self.blocks {
            None => Ok(self.tensor.clone()),
            Some(blocks) => self.quantized(blocks).dequantize(),
        }
    }

    fn quantized(&self, blocks: &Arc<QTensor>) -> Quantized {
        Quantized::new(blocks.clone(), self.tensor.dtype())
    }

    /// The same weight without a graph.
    pub fn detach(&self) -> Self {
        match &self.blocks {
            None => Self { tensor: self.tensor.detach(), blocks: None },
            Some(_) => self.clone(),
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
