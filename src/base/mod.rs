//! Base tensors on their way to a model: `VarBuilder`s over files, and around other `VarBuilder`s.
//!
//! A model on [`nn`](crate::nn) is built on one of them; matrices may stay quantised, or in half precision. [`read_config`]
//! reads the model's configuration.

// Each is a `Source`: it gives tensors by name, or changes what another one gives. Matrices that stay quantised come as
// placeholders; `layers::binding` has how they reach a layer.

pub(crate) mod cache;
pub(crate) mod config;
mod half_var_builder;
pub(crate) mod quantized;
mod resized_embeddings;
mod safetensors_var_builder;
mod seeded;
pub(crate) mod source;
pub(crate) mod split_experts;
mod var_builder;

pub use config::read_config;
pub use half_var_builder::half_var_builder;
pub use resized_embeddings::resized_embeddings;
pub use safetensors_var_builder::safetensors_var_builder;
pub use seeded::seeded;
pub use split_experts::split_experts;
pub use var_builder::var_builder;
pub(crate) use var_builder::var_builder_with;
