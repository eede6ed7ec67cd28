//! Merges an adapter into a GGUF base: as a GGUF file, or by Hugging Face's names as a safetensors file.

mod layout;
mod plan;
mod rounded;
mod to_gguf;
mod to_safetensors;

pub use to_gguf::{merge, MergeOptions};
pub use to_safetensors::merge_to_safetensors;
