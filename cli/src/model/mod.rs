//! A language model from a Hugging Face folder or a GGUF file.

mod attention;
mod base;
mod config;
mod decoder;
mod folder;
mod gguf;
mod rope;
mod template;
#[cfg(test)]
mod tests;
mod texts;
mod tokens;

pub use base::Base;
pub use config::Config;
pub use decoder::{Cache, Decoder, Segment};
pub use template::Template;
pub use tokens::Tokens;
