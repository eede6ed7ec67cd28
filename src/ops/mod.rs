//! Operations with gradients: everything that candle lacks or gets wrong for a frozen base with a
//! low-rank update. An adapted layer is one of these formulas; all tensors are plain candle tensors.

mod activation;
mod adamw;
mod attention;
mod backend;
mod checked_size;
mod conv;
mod cpu;
mod cross_entropy;
mod custom_gradient;
mod decompose;
mod dora;
mod dropout;
mod elementwise;
mod embedding;
mod finite;
mod linear;
mod lora;
mod matrix;
mod merge;
mod norm;
mod op;
mod recompute;
mod rope;
mod softmax;

pub(crate) use activation::{activation, Activation};
pub(crate) use adamw::{adamw, new_moments, AdamWStep};
pub(crate) use attention::{attention, Mask};
pub(crate) use checked_size::{checked_elem_count, checked_product};
pub(crate) use conv::{conv, Geometry};
pub(crate) use cross_entropy::cross_entropy;
pub(crate) use custom_gradient::{upstream, with_grads};
pub(crate) use decompose::{qr, svd, Svd};
pub(crate) use dora::squares;
pub(crate) use dropout::DropoutStream;
pub(crate) use elementwise::add_bias;
pub(crate) use embedding::embedding;
pub(crate) use finite::is_finite;
pub(crate) use linear::{linear, linear_rows};
pub(crate) use lora::{joined, weighted_sum, LowRank, Magnitude, Split};
pub(crate) use matrix::{Matrix, Quantized};
pub(crate) use merge::merge;
pub(crate) use norm::{layer_norm, rms_norm};
pub(crate) use recompute::{recompute, SegmentVars};
pub(crate) use rope::{rope, Rope};
pub(crate) use softmax::softmax_last_dim;
