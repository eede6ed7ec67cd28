//! An encoder of sentences from a Hugging Face folder, for classification and for embeddings.

mod base;
mod config;
mod head;
mod layers;

#[cfg(test)]
mod tests;

pub use base::{is_encoder, names, Base};
pub use head::{Model, Task};
