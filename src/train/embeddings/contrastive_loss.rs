//! A contrastive loss for embeddings.

use super::normalize::normalize;
use candle_core::{bail, Result, Tensor};

/// The loss that teaches a model to embed a query near its document and far from those of the others in the batch: the
/// mean cross-entropy of `cos(query, document) / temperature` over all documents. It is InfoNCE, and
/// sentence-transformers' `MultipleNegativesRankingLoss`, whose `scale` is `1 / temperature`, 20 by default.
///
/// `queries` is (batch, d), `documents` (at least batch, d): the first `batch` documents are those of the queries, in their
/// order; the others, hard negatives, are of none. The rows need not have the length 1. The loss is a scalar in F32, or in
/// F64 if the rows are.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{Device, Tensor, Var};
/// use loralib::train::contrastive_loss;
///
/// let queries = Var::new(&[[1f32, 0.], [0., 2.]], &Device::Cpu)?;
/// let documents = Tensor::new(&[[3f32, 0.], [0., 1.], [1., 1.]], &Device::Cpu)?;
/// let loss = contrastive_loss(&queries, &documents, 0.05)?;
/// assert!(loss.to_scalar::<f32>()? < 0.01);
/// let grads = loss.backward()?;
/// assert!(grads.get(&queries).is_some());
/// # Ok(()) }
/// ```
///
/// More pairs in a batch make a harder task, and need memory for the activations of all. With
/// [`Adapter::checkpoint`](crate::Adapter::checkpoint) around the whole model, each part of a batch keeps its embeddings
/// alone, and the backward runs the model on one part at a time: the cached gradients of GradCache (arXiv 2101.06983) and
/// of sentence-transformers' `CachedMultipleNegativesRankingLoss`, the same but for rounding.
///
/// ```
/// # use candle_core::{DType, Device, Module, Tensor};
/// # use loralib::{nn as candle_nn, train::contrastive_loss, Adapter, LoraConfig};
/// # fn main() -> loralib::Result<()> {
/// # let base = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
/// # let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["fc"]);
/// # let layer = candle_nn::linear(4, 4, adapter.var_builder(base).pp("fc"))?;
/// # let model = std::sync::Arc::new(layer);
/// # let texts = Tensor::rand(0f32, 1., (12, 4), &Device::Cpu)?;
/// // Six queries and their documents, four texts at a time.
/// let parts = texts.chunk(3, 0)?;
/// let embedded = parts.iter().map(|part| {
///     let model = model.clone();
///     adapter.checkpoint("", part, move |part| model.forward(part))
/// });
/// let embedded = Tensor::cat(&embedded.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
/// let loss = contrastive_loss(&embedded.narrow(0, 0, 6)?, &embedded.narrow(0, 6, 6)?, 0.05)?;
/// let grads = loss.backward()?;
/// # assert!(loralib::missing_grads(adapter.var_map(), &grads).is_empty());
/// # Ok(()) }
/// ```
///
/// # Errors
/// If the tensors are not matrices of the same width, if there are fewer documents than queries or only one, or if
/// `temperature` is not positive.
pub fn contrastive_loss(queries: &Tensor, documents: &Tensor, temperature: f64) -> Result<Tensor> {
    let ((batch, d), (count, width)) = (queries.dims2()?, documents.dims2()?);
    if d != width {
        bail!("contrastive_loss: queries are {d} wide, documents {width}")
    }
    if batch == 0 || count < batch.max(2) {
        bail!(
            "contrastive_loss: {batch} queries and {count} documents: expected a document for each query, and at least two"
        )
    }
    if !(temperature > 0. && temperature.is_finite()) {
        bail!("contrastive_loss: the temperature is {temperature}, expected more than 0")
    }
    let cosines = normalize(queries)?.matmul(&normalize(documents)?.t()?)?;
    let own = Tensor::arange(0, batch as u32, queries.device())?;
    candle_nn::loss::cross_entropy(&(cosines / temperature)?, &own)
}
