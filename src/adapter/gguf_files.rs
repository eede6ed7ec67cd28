//! An adapter's file in llama.cpp's form.

use super::Adapter;
use crate::{gguf, Result};
use candle_core::Device;
use std::path::Path;

impl Adapter {
    /// Writes the adapter as a GGUF file for programs on llama.cpp, such as `llama-cli --lora`, beside a base of
    /// the same model; see [`gguf::save_adapter`].
    ///
    /// # Errors
    /// As [`gguf::save_adapter`].
    pub fn save_gguf(&self, path: impl AsRef<Path>, base: &gguf::File) -> Result<()> {
        gguf::save_adapter(path, &self.state_dict()?, self.config(), base)
    }

    /// Reads an adapter that [`save_gguf`](Self::save_gguf) or llama.cpp's converter wrote. As in
    /// [`load`](Self::load), its layers are its targets; see [`gguf::load_adapter`].
    ///
    /// # Errors
    /// As [`gguf::load_adapter`].
    pub fn load_gguf(path: impl AsRef<Path>, base: &gguf::File, device: &Device) -> Result<Self> {
        let (config, tensors) = gguf::load_adapter(path, base, device)?;
        Self::loaded(config, tensors)
    }
}
