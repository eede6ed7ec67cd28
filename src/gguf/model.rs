//! What a file has for the model: tensors by Hugging Face's names, the configuration and the tokenizer.

use super::architecture::{HEAD, MODEL};
use super::config::config;
use super::file::File;
use super::file_var_builder::FileTensors;
use super::metadata::Metadata;
use super::names::ROPE_FREQS;
use super::tokenizer::tokenizer;
use crate::base::config::fitted;
use crate::base::quantized::Dense;
use crate::base::source::from_source;
use crate::{Error, Result};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::de::DeserializeOwned;

impl File {
    /// A `VarBuilder` that gives the tensors by Hugging Face's names, such as
    /// `model.layers.0.self_attn.q_proj.weight`, in Hugging Face's order of rows. Each is read when the model
    /// asks for it, and once: after loading, the model takes about as much memory as the file has bytes.
    ///
    /// Matrices stay quantised, but for those in F32 and, on devices and for a model in half precision, those in F16
    /// and BF16. What a model gets in their place is a tensor whose values are NaN, from which the constructors of
    /// [`lora::nn`](crate::nn)'s `Linear` and `Embedding` take the blocks: no other code can compute with it. The
    /// `VarBuilder` has to live until the layers are built. All other tensors have the given dtype.
    ///
    /// # Errors
    /// If the architecture is unknown, or a tensor of the file has no name in it, such as the experts of a
    /// mixture. The error names the file and the tensor. Reading a tensor is an error if the file has
    /// none of the name, or its shape is another.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        Ok(from_source(self.named_tensors()?, dtype, device))
    }

    /// [`var_builder`](Self::var_builder) with dense tensors of the given dtype alone: for models that do not know
    /// this crate, such as candle-transformers'. As long as it lives, it also holds the quantised ones.
    ///
    /// # Errors
    /// As [`var_builder`](Self::var_builder).
    pub fn dense_var_builder(&self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        Ok(from_source(Dense(self.named_tensors()?), dtype, device))
    }

    fn named_tensors(&self) -> Result<FileTensors> {
        FileTensors::new(self).map_err(|error| error.at(self.path()))
    }

    /// The model's `config.json` as Hugging Face writes it, as the `Config` of a model in
    /// candle-transformers or of your own.
    ///
    /// # Errors
    /// If the architecture is unknown, the metadata lacks a value or has one that no configuration can tell,
    /// or `T` needs another one; and if `T` has no field for the `rope_scaling` that the file has. The error names the file
    /// and the metadata.
    pub fn config<T: DeserializeOwned>(&self) -> Result<T> {
        let read = || {
            let tied = self.find(HEAD.0).is_none();
            let vocab_size = self.info(MODEL[0].0)?.dims.first().copied().unwrap_or(0);
            let rope_freqs = match self.find(ROPE_FREQS) {
                None => None,
                Some(_) => {
                    let tensor = self.read(ROPE_FREQS, &Device::Cpu)?.dequantize(&Device::Cpu)?;
                    Some(tensor.flatten_all()?.to_vec1()?)
                }
            };
            let freqs = rope_freqs.as_deref();
            let (architecture, metadata) = (self.architecture(), self.metadata());
            let json = config(architecture, metadata, tied, vocab_size, freqs)?;
            fitted(json)
        };
        read().map_err(|error: Error| error.at(self.path()))
    }

    /// The model's `tokenizer.json` as Hugging Face writes it, for the crate `tokenizers`.
    ///
    /// # Errors
    /// If the file has no tokenizer, or one of an unknown kind; the known ones are byte-level BPE and
    /// SentencePiece's BPE. The error names the file and the metadata.
    pub fn tokenizer_json(&self) -> Result<String> {
        let tokenizer = tokenizer(self.metadata());
        Ok(tokenizer.map_err(|error| error.at(self.path()))?.to_string())
    }

    /// The template of a conversation, in Jinja's language, if the file has one.
    pub fn chat_template(&self) -> Option<&str> {
        Metadata(self.metadata()).string("tokenizer.chat_template").ok().flatten()
    }
}
