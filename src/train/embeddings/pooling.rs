//! From a text's tokens to one vector.

use crate::ops::compute_dtype;
use candle_core::{bail, DType, Device, Result, Tensor};

/// How a text's hidden states become its embedding, as sentence-transformers' `Pooling`.
///
/// ```
/// # fn main() -> candle_core::Result<()> {
/// use candle_core::{Device, Tensor};
/// use loralib::train::Pooling;
///
/// let hidden = Tensor::new(&[[[1f32, 1.], [3., 5.], [9., 9.]]], &Device::Cpu)?;
/// let mask = Tensor::new(&[[1u32, 1, 0]], &Device::Cpu)?; // the last is padding
/// let mean = Pooling::Mean.pool(&hidden, &mask)?;
/// assert_eq!(mean.to_vec2::<f32>()?, [[2., 3.]]);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pooling {
    /// The mean of the tokens.
    #[default]
    Mean,
    /// The first token, BERT's `[CLS]`.
    Cls,
    /// The last token, which in a decoder has seen all others.
    LastToken,
}

impl Pooling {
    /// The embeddings (batch, d) of texts from their hidden states (batch, tokens, d) and the mask of their tokens (batch,
    /// tokens), 0 for padding on either side. In F32, or F64 for F64.
    ///
    /// # Errors
    /// If the shapes do not fit, or a text has no tokens.
    pub fn pool(self, hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = hidden.dims3()?;
        if mask.dims() != [batch, tokens] {
            let (hidden, mask) = (hidden.dims(), mask.dims());
            bail!("pooling: the hidden states are {hidden:?} and the mask {mask:?}, expected (batch, tokens)")
        }
        let kept = mask.ne(&mask.zeros_like()?)?;
        let rows = kept.to_device(&Device::Cpu)?.to_vec2::<u8>()?;
        if let Some(i) = rows.iter().position(|row| row.iter().all(|kept| *kept == 0)) {
            bail!("pooling: the mask of text {i} is all 0")
        }
        let dtype = compute_dtype(hidden.dtype());
        let at = |find: fn(&[u8]) -> Option<usize>| {
            let first = (0..batch).map(|i| i * tokens);
            let at = first.zip(&rows).map(|(first, row)| (first + find(row).unwrap_or(0)) as u32);
            let at = Tensor::from_iter(at, hidden.device())?;
            hidden.flatten(0, 1)?.index_select(&at, 0)?.to_dtype(dtype)
        };
        match self {
            Self::Cls => at(|row| row.iter().position(|kept| *kept == 1)),
            Self::LastToken => at(|row| row.iter().rposition(|kept| *kept == 1)),
            Self::Mean => {
                let kept = kept.to_dtype(DType::F32)?.to_dtype(dtype)?;
                let sums = kept.unsqueeze(1)?.matmul(&hidden.to_dtype(dtype)?)?.squeeze(1)?;
                sums.broadcast_div(&kept.sum_keepdim(1)?)
            }
        }
    }
}
