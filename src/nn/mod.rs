//! candle_nn with gradients and adapters: the same names, paths and signatures.
//!
//! A model file written for candle_nn, such as a copy of one of candle-transformers, trains after one line
//! at its top:
//!
//! ```
//! use loralib::nn as candle_nn;
//! use candle_nn::{linear, Linear, VarBuilder}; // the file's own imports follow
//! ```
//!
//! Replaced are the operations without a backward ([`ops::softmax_last_dim`], [`ops::rms_norm`],
//! [`ops::layer_norm`], [`RmsNorm`], [`LayerNorm`], [`rotary_emb`], the caches of [`kv_cache`] and
//! [`attention::flash_attn`]), the layers that an [`Adapter`](crate::Adapter) can adapt
//! ([`Linear`], [`Embedding`], [`Conv1d`], [`Conv2d`]), and [`BatchNorm`], whose statistics are frozen with the base.
//! Everything else is candle_nn's.
//!
//! - A frozen weight, gain or bias gets no gradient; a variable gets its own.
//! - On the CPU the replaced operations are fused, forward and backward, in F32, and compute F16 and BF16 in F32. In F64
//!   and on devices they are candle's kernels with a backward of a few operations.
//! - [`flash_attn`](mod@flash_attn) has the functions of the crate `candle_flash_attn`.
//! - Without a variable behind their inputs softmax, norms, rotations and attention are candle's own.
//!
//! Not replaced, and without a backward: `ops::sdpa`, `moe` (but for [`moe::route`]), `attention::cpu_flash`, `attention::varlen`, and the caches
//! that [`kv_cache`] does not list. `Tensor::conv1d`, pooling and other methods of candle_core are beyond the reach of this
//! module.

pub use candle_nn::*;

pub mod attention;
pub mod batch_norm;
pub mod conv;
pub mod embedding;
pub mod flash_attn;
pub mod kv_cache;
pub mod layer_norm;
pub mod linear;
pub mod moe;
pub mod ops;
pub mod rotary_emb;
pub mod with_tracing;

pub use batch_norm::{batch_norm, BatchNorm};
pub use conv::{conv1d, conv1d_no_bias, conv2d, conv2d_no_bias, Conv1d, Conv2d};
pub use embedding::{embedding, Embedding};
pub use layer_norm::{layer_norm, layer_norm_no_bias, rms_norm, LayerNorm, RmsNorm};
pub use linear::{linear, linear_b, linear_no_bias, Linear};
