//! Texts to vectors.

use crate::bert::Bert;
use candle_core::{Device, Error, Result, Tensor};
use loralib::train::Pooling;
use tokenizers::{Encoding, Tokenizer};

pub struct Encoder {
    pub tokenizer: Tokenizer,
    pub bert: Bert,
}

impl Encoder {
    /// Ids and mask (texts, tokens).
    pub fn tokens(&self, texts: &[&str]) -> Result<(Tensor, Tensor)> {
        let encoded = self.tokenizer.encode_batch(texts.to_vec(), true).map_err(Error::msg)?;
        let of = |of: fn(&Encoding) -> &[u32]| {
            Tensor::new(encoded.iter().map(of).collect::<Vec<_>>(), &Device::Cpu)
        };
        Ok((of(Encoding::get_ids)?, of(Encoding::get_attention_mask)?))
    }

    pub fn embed(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        Pooling::Mean.pool(&self.bert.forward(ids, mask)?, mask)
    }

    /// Vectors (texts, hidden_size).
    pub fn of(&self, texts: &[&str]) -> Result<Tensor> {
        let (ids, mask) = self.tokens(texts)?;
        self.embed(&ids, &mask)
    }
}
