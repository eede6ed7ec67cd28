//! The weight of a product: a dense matrix, or blocks of quantised values.

use super::place::is_fused;
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};
use std::sync::Arc;

/// A matrix of two dimensions.
#[derive(Debug, Clone)]
pub(crate) enum Matrix {
    Dense(Tensor),
    Quantized(Quantized),
}

impl Matrix {
    pub fn t(&self) -> Result<Self> {
        Ok(match self {
            Self::Dense(w) => Self::Dense(w.t()?),
            Self::Quantized(w) => Self::Quantized(w.t()),
        })
    }

    /// The same values without a graph.
    pub fn detach(&self) -> Self {
        match self {
            Self::Dense(w) => Self::Dense(w.detach()),
            Self::Quantized(w) => Self::Quantized(w.clone()),
        }
    }

    /// The same values in a layout of [`gemm_layout`].
    pub fn gemm_operand(&self) -> Result<Self> {
        Ok(match self {
            Self::Dense(w) => Self::Dense(gemm_layout(w.clone())?),
            Self::Quantized(w) => Self::Quantized(w.clone()),
        })
    }

    /// The dense matrix, if it is one.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(w) => Some(w),
            Self::Quantized(_) => None,
        }
    }

    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(w) => w.dims2(),
            Self::Quantized(w) => w.dims2(),
        }
    }

    /// The dtype of the product's other operand and of its result.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(w) => w.dtype(),
            Self::Quantized(w) => w.dtype,
        }
    }

    pub fn device(&self) -> Device {
        match self {
            Self::Dense(w) => w.device().clone(),
            Self::Quantized(w) => w.blocks.device(),
        }
    }
}

/// `x` if the backend's GEMM accepts its layout (CPU: any strides; devices, MKL and Accelerate:
/// contiguous or transposed contiguous), else a contiguous copy.
pub(super) fn gemm_layout(x: Tensor) -> Result<Tensor> {
    let any = is_fused(x.device()) && !cfg!(any(feature = "mkl", feature = "accelerate"));
    if any || x.is_contiguous() || x.t()?.is_contiguous() {
        Ok(x)
    } else {
        x.contiguous()
    }
}

/// A matrix that stays quantised. It has no gradient.
#[derive(Debug, Clone)]
pub(crate) struct Quantized {
    blocks: Arc<QTensor>,
    transposed: bool,
    dtype: DType,
}

impl Quantized {
    /// The matrix as it is stored, beside operands of `dtype`.
    pub fn new(blocks: Arc<QTensor>, dtype: DType) -> Self {
        Self { blocks, transposed: false, dtype }
    }

    fn t(&self) -> Self {
        Self { transposed: !self.transposed, ..self.clone() }
    }

    fn dims2(&self) -> Result<(usize, usize)> {
        let (rows, columns) = self.blocks.shape().dims2()?;
        Ok(if self.transposed { (columns, rows) } else { (rows, columns) })
    }

    /// The stored matrix: the blocks run along its rows.
    pub fn blocks(&self) -> &QTensor {
        &self.blocks
    }

    /// Whether this is the transpose of the stored matrix.
    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// The values, in the dtype.
    pub fn dequantize(&self) -> Result<Tensor> {
        let device = self.blocks.device();
        let values = match self.dtype {
            // CUDA has a kernel for blocks alone.
            DType::F16 if self.blocks.dtype().block_size() > 1 => {
                self.blocks.dequantize_f16(&device)?
            }
            dtype => self.blocks.dequantize(&device)?.to_dtype(dtype)?,
        };
        if self.transposed {
            values.t()
        } else {
            Ok(values)
        }
    }

    /// Rows of the stored matrix by valid ids (ids), as (ids, columns).
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        self.blocks.embedding(&ids.to_dtype(DType::U32)?)?.to_dtype(self.dtype)
    }
}
