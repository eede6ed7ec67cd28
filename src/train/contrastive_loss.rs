//! A contrastive loss for embeddings.

use candle_core::{bail, DType, Result, Tensor, D};

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
    let cosines = unit_rows(queries)?.matmul(&unit_rows(documents)?.t()?)?;
    let own = Tensor::arange(0, batch as u32, queries.device())?;
    candle_nn::loss::cross_entropy(&(cosines / temperature)?, &own)
}

/// Each row divided by its length, but for rows of zeros.
fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let dtype = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let x = x.to_dtype(dtype)?;
    // torch's smallest length, 1e-12.
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.maximum(1e-24)?.sqrt()?;
    x.broadcast_div(&length)
}
