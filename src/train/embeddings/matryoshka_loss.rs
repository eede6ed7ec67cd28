//! Embeddings whose beginnings are embeddings.

use candle_core::{bail, Result, Tensor};

/// The sum of a loss over the first values of the embeddings, for each of some numbers of them: sentence-transformers'
/// `MatryoshkaLoss`, with weights of 1. What a model so trained gives can be cut to one of these numbers.
///
/// `queries` (.., d) and `documents` (.., d) are given to `loss` with as many of their d values as each of `dims` says, of
/// which one should be d.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{Device, Var};
/// use loralib::train::{contrastive_loss, matryoshka_loss};
///
/// let queries = Var::rand(-1f32, 1., (4, 32), &Device::Cpu)?;
/// let documents = Var::rand(-1f32, 1., (4, 32), &Device::Cpu)?;
/// let loss = matryoshka_loss(&queries, &documents, &[32, 16, 8], |queries, documents| {
///     contrastive_loss(queries, documents, 0.05)
/// })?;
/// assert!(loss.backward()?.get(&documents).is_some());
/// # Ok(()) }
/// ```
///
/// # Errors
/// Those of `loss`; and if `dims` is empty, or has a number twice, 0, or one above d.
pub fn matryoshka_loss(
    queries: &Tensor,
    documents: &Tensor,
    dims: &[usize],
    loss: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let width = queries.dims().last().copied().unwrap_or(0);
    for (i, dim) in dims.iter().enumerate() {
        if *dim == 0 || *dim > width {
            bail!("matryoshka_loss: dims[{i}] is {dim}, expected 1 to {width}")
        }
        if dims[..i].contains(dim) {
            bail!("matryoshka_loss: dims has {dim} twice")
        }
    }
    let of = |dim: &usize| {
        let first = |x: &Tensor| x.narrow(x.rank().saturating_sub(1), 0, *dim)?.contiguous();
        loss(&first(queries)?, &first(documents)?)
    };
    let Some((first, others)) = dims.split_first() else { bail!("matryoshka_loss: dims is empty") };
    others.iter().try_fold(of(first)?, |sum, dim| sum + of(dim)?)
}
