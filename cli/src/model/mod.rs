//! A language model (Llama, Mistral, Qwen2 or Qwen3) from a Hugging Face folder or a GGUF file.

mod attention;
mod base;
mod config;
mod folder;
mod gguf;
mod llama;
mod rope;
mod template;
mod tokens;

pub use base::Base;
pub use config::Config;
pub use llama::{Llama, Segment};
pub use template::Template;
pub use tokens::Tokens;
