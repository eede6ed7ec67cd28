//! Tables of embeddings with rows for new tokens.

use super::source::{from_source, Source, Wanted};
use crate::layers::binding::placeholder::dequantized;
use crate::layers::Part;
use crate::weights::{is_input_table, is_output_head};
use crate::Result;
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

/// `base` for a model with a larger vocabulary, as by transformers' `resize_token_embeddings`: a table of embeddings, and a
/// language model's head, that has fewer rows than the model asks for gets new ones behind its own. Each is the mean of
/// its own rows, which transformers adds small noise to.
///
/// The names are those of transformers' models, such as `model.embed_tokens.weight` and `lm_head.weight`. The model's
/// configuration says how many rows it asks for; a table that has more than that stays an error. A quantised one becomes
/// dense. To train the new rows, name their indices in
/// [`trainable_token_indices`](crate::adapter::AdapterConfig::trainable_token_indices), and give the same to a base that
/// the adapter is loaded for.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Tensor};
/// use loralib::{adapter::AdapterConfig, base::resized_embeddings, nn as candle_nn, Adapter, LoraConfig};
///
/// let table = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let base = [("model.embed_tokens.weight".to_owned(), table)].into();
/// let base = candle_nn::VarBuilder::from_tensors(base, DType::F32, &Device::Cpu);
///
/// let mut config = AdapterConfig::from(LoraConfig::default());
/// config.trainable_token_indices.insert("embed_tokens".to_owned(), vec![2]); // the new token
/// let adapter = Adapter::new(config);
/// let vb = adapter.var_builder(resized_embeddings(base));
/// let table = candle_nn::embedding(3, 2, vb.pp("model.embed_tokens"))?;
/// assert_eq!(table.embeddings().to_vec2::<f32>()?, [[1., 2.], [3., 4.], [2., 3.]]);
/// assert_eq!(adapter.named_vars()?["model.embed_tokens.trainable_tokens"].dims(), [1, 2]);
/// # Ok(()) }
/// ```
pub fn resized_embeddings(base: VarBuilder<'_>) -> VarBuilder<'_> {
    let (dtype, device) = (base.dtype(), base.device().clone());
    from_source(Resized(base), dtype, &device)
}

struct Resized<'a>(VarBuilder<'a>);

impl Source for Resized<'_> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let is_table = match Part::parse(name) {
            (path, Part::Base("weight")) => is_input_table(path) || is_output_head(path),
            _ => false,
        };
        let (true, Some(&[rows, dim])) = (is_table, wanted.shape.map(|shape| shape.dims())) else {
            return self.0.tensor(name, wanted);
        };
        let own = Source::tensor(&self.0, name, &Wanted { shape: None, ..*wanted })?;
        match *own.dims() {
            [count, own_dim] if own_dim == dim && 0 < count && count < rows => {
                let own = dequantized(own)?;
                let mean = own.to_dtype(DType::F32)?.mean_keepdim(0)?.to_dtype(own.dtype())?;
                let new = mean.broadcast_as((rows - count, dim))?.contiguous()?;
                Ok(Tensor::cat(&[&own, &new], 0)?)
            }
            _ => wanted.check(name, own.dims()).map(|()| own),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.0.has(name)
    }
}
