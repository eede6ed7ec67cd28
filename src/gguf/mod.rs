//! GGUF files.

mod config;
mod metadata;
mod tokenizer;
