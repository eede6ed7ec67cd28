//! [`mod@candle_nn::embedding`], adapted by name.

use crate::layers::binding::target::target_of;
use crate::layers::{self, EmbeddingKind, LayerKind, Placement, Weight};
use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use std::ops::Deref;

/// [`candle_nn::Embedding`] with an adapter if its table is a target of an [`Adapter`](crate::Adapter): ids
/// (..) to (.., dim). It dereferences to [`loralib::Embedding`](crate::Embedding).
#[derive(Debug, Clone)]
pub struct Embedding {
    layer: layers::Embedding,
    hidden_size: usize,
}

impl Embedding {
    /// A layer with `embeddings` (num, dim). An adaptation that fails is reported by
    /// [`Adapter::check`](crate::Adapter::check).
    pub fn new(embeddings: Tensor, hidden_size: usize) -> Self {
        let adapted = target_of(&embeddings)
            .and_then(|module| module.adapt(&embeddings, None, LayerKind::Embedding));
        let weight =
            adapted.unwrap_or_else(|| Weight::plain(embeddings, None, Placement::Transposed));
        Self { layer: layers::Embedding::from_parts(EmbeddingKind::default(), weight), hidden_size }
    }

    /// The same layer with torch's `padding_idx`; see [`layers::Embedding::with_padding_idx`].
    ///
    /// # Errors
    /// If the table has no such row.
    pub fn with_padding_idx(self, padding_idx: usize) -> Result<Self> {
        Ok(Self { layer: self.layer.with_padding_idx(padding_idx)?, ..self })
    }

    /// The base table (num, dim).
    pub fn embeddings(&self) -> &Tensor {
        self.layer.weight()
    }

    /// dim
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }
}

impl Deref for Embedding {
    type Target = layers::Embedding;

    fn deref(&self) -> &Self::Target {
        &self.layer
    }
}

impl Module for Embedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.layer.forward(ids)
    }
}

/// [`candle_nn::embedding()`].
///
/// # Errors
/// If `vb` lacks the table or has it in another shape.
pub fn embedding(num: usize, dim: usize, vb: VarBuilder) -> Result<Embedding> {
    // The module is bound to the table as long as the last `VarBuilder` lives.
    let base = candle_nn::embedding(num, dim, vb.clone())?;
    Ok(Embedding::new(base.embeddings().clone(), dim))
}
