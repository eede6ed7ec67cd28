//! From a text's tokens to one vector.

use crate::ops::compute_dtype;
use candle_core::{bail, DType, Device, Error, Result, Tensor};
use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

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
        let mask = mask.ne(&mask.zeros_like()?)?.to_device(&Device::Cpu)?;
        let lens = mask.to_dtype(DType::U32)?.sum(1)?.to_vec1::<u32>()?;
        let kept = mask.flatten_all()?.to_vec1::<u8>()?;
        let kept = kept.iter().enumerate().filter(|(_, kept)| **kept > 0);
        let kept = Tensor::from_iter(kept.map(|(i, _)| i as u32), hidden.device())?;
        let lens: Vec<_> = lens.into_iter().map(|len| len as usize).collect();
        self.pool_packed(&hidden.flatten(0, 1)?.index_select(&kept, 0)?, &lens)
    }

    /// The embeddings (texts, d) of texts of these lengths, whose hidden states (tokens, d) stand one after another without
    /// padding, as `flash_attn_varlen` takes them. In F32, or F64 for F64.
    ///
    /// # Errors
    /// If the lengths are not those of `hidden`, or one is 0.
    pub fn pool_packed(self, hidden: &Tensor, lens: &[usize]) -> Result<Tensor> {
        let ((tokens, d), device) = (hidden.dims2()?, hidden.device());
        if let Some(i) = lens.iter().position(|len| *len == 0) {
            bail!("pooling: text {i} has no tokens")
        }
        if lens.iter().sum::<usize>() != tokens {
            bail!("pooling: {tokens} hidden states, the texts have {}", lens.iter().sum::<usize>())
        }
        let dtype = compute_dtype(hidden.dtype());
        let ends = lens.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        });
        let at: Vec<_> = match self {
            Self::Cls => ends.zip(lens).map(|(end, len)| (end - len) as u32).collect(),
            Self::LastToken => ends.map(|end| (end - 1) as u32).collect(),
            Self::Mean => {
                let text = lens.iter().enumerate().flat_map(|(i, len)| vec![i as u32; *len]);
                let text = Tensor::from_iter(text, device)?;
                let sums = Tensor::zeros((lens.len(), d), dtype, device)?;
                let sums = sums.index_add(&text, &hidden.to_dtype(dtype)?, 0)?;
                let counts = Tensor::from_iter(lens.iter().map(|len| *len as f64), device)?;
                return sums.broadcast_div(&counts.to_dtype(dtype)?.unsqueeze(1)?);
            }
        };
        hidden.index_select(&Tensor::new(at, device)?, 0)?.to_dtype(dtype)
    }
}

impl FromStr for Pooling {
    type Err = Error;

    /// By sentence-transformers' names: `mean`, `cls` or `lasttoken`.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "mean" => Ok(Self::Mean),
            "cls" => Ok(Self::Cls),
            "lasttoken" => Ok(Self::LastToken),
            _ => bail!("the pooling is {name:?}, expected mean, cls or lasttoken"),
        }
    }
}

impl Display for Pooling {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Mean => "mean",
            Self::Cls => "cls",
            Self::LastToken => "lasttoken",
        })
    }
}
