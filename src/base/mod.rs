//! Base tensors on their way to a model: each `VarBuilder` of this crate is a [`Source`](source::Source).
//!
//! A source gives tensors by name, or changes what another source gives: one can be wrapped around any `VarBuilder`.
//! Matrices that stay quantised come as placeholders; [`binding`](crate::layers::binding) has how they reach a layer.

pub(crate) mod cache;
mod half_var_builder;
pub(crate) mod quantized;
mod safetensors_var_builder;
mod seeded;
pub(crate) mod source;
mod var_builder;

pub use half_var_builder::half_var_builder;
pub use safetensors_var_builder::safetensors_var_builder;
pub use seeded::seeded;
pub use var_builder::var_builder;
pub(crate) use var_builder::var_builder_with;
