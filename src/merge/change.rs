//! What an adapter does to a tensor of the base.

use super::experts::merged_experts;
use super::weight::merged_weight;
use crate::layers::LoraConfig;
use crate::ops::is_finite;
use crate::weights::{LayerWeights, TokenRows};
use candle_core::{bail, DType, Result, Tensor};

#[derive(Clone)]
pub(super) enum Change {
    /// The adapter's own tensor in place of the base's.
    Replace(Tensor),
    /// The merged weight of a layer, or a merged parameter.
    Update(LayerWeights),
    /// The bias plus the scaled bias of lora_B.
    AddBias { bias: Tensor, scaling: f64 },
    /// Rows of a table.
    Rows(TokenRows),
}

impl Change {
    /// Whether the change of a table is one of a head that is tied to it, too, as in PEFT's model: it writes a tensor that
    /// it does not train into the base's own, and ties rows, but a module that it trains is a copy.
    pub fn is_of_tied(&self, is_module: impl FnOnce() -> bool) -> bool {
        match self {
            Self::Replace(_) => !is_module(),
            Self::Rows(_) => true,
            Self::Update(_) | Self::AddBias { .. } => false,
        }
    }

    /// `base` with the change; `options` are the adapter's.
    pub fn apply(&self, base: &Tensor, options: &LoraConfig) -> Result<Tensor> {
        match self {
            Self::Replace(tensor) => replaced(base, tensor),
            Self::Update(layer) if layer.is_parameter() => merged_experts(base, layer, options),
            Self::Update(layer) => merged_weight(base, layer, options),
            Self::AddBias { bias, scaling } => with_bias(base, bias, *scaling),
            Self::Rows(TokenRows { indices, rows }) => with_rows(base, indices, rows),
        }
    }
}

fn replaced(base: &Tensor, tensor: &Tensor) -> Result<Tensor> {
    if base.shape() != tensor.shape() {
        bail!("its shape is {:?} in the base, {:?} in the adapter", base.dims(), tensor.dims())
    }
    tensor.to_device(base.device())?.to_dtype(base.dtype())
}

fn with_bias(base: &Tensor, bias: &Tensor, scaling: f64) -> Result<Tensor> {
    let bias = replaced(&base.to_dtype(DType::F64)?, bias)?;
    let merged = (base.to_dtype(DType::F64)? + (bias * scaling)?)?.to_dtype(base.dtype())?;
    if !is_finite(&merged)? {
        bail!("the merged bias in {:?} is not finite", base.dtype())
    }
    Ok(merged)
}

fn with_rows(base: &Tensor, indices: &[usize], rows: &Tensor) -> Result<Tensor> {
    let (count, dim) = base.dims2()?;
    if rows.dims() != [indices.len(), dim] {
        bail!(
            "its shape is {:?}, the adapter has {} token indices and rows of the shape {:?}",
            base.dims(),
            indices.len(),
            rows.dims()
        )
    }
    if let Some(index) = indices.iter().find(|index| **index >= count) {
        bail!(
            "the adapter has a row for token {index}, the table {count} rows: add those of new tokens to the \
             base first, a `VarBuilder` by `base::resized_embeddings`"
        )
    }
    // The new rows behind the table's; of a repeated index the last counts.
    let mut from: Vec<u32> = (0..count as u32).collect();
    for (row, index) in indices.iter().enumerate() {
        from[*index] = (count + row) as u32;
    }
    let rows = rows.to_device(base.device())?.to_dtype(base.dtype())?;
    let from = Tensor::new(from, base.device())?;
    Tensor::cat(&[base, &rows], 0)?.index_select(&from, 0)
}
