//! Operations with gradients: everything that candle lacks or gets wrong for a frozen base with a
//! low-rank update. An adapted layer is one of these formulas; all tensors are plain candle tensors.

mod activation;
mod adamw;
mod attention;
mod backend;
mod checkpoint;
mod conv;
mod cpu;
mod cross_entropy;
mod dropout;
mod elementwise;
mod embedding;
mod finite;
mod fused;
mod given_grads;
mod linear;
mod low_rank;
mod matmul;
mod matrix;
mod merge;
mod norm;
mod op;
mod rope;
mod shape;
mod softmax;
mod zero_grads;

pub(crate) use activation::{activation, Activation};
pub(crate) use adamw::{adamw, new_moments, AdamWStep};
pub(crate) use attention::{attention, Mask};
pub(crate) use checkpoint::{checkpoint, SegmentVars};
pub(crate) use conv::{conv, Geometry};
pub(crate) use cross_entropy::cross_entropy;
pub(crate) use dropout::DropoutStream;
pub(crate) use elementwise::add_bias;
pub(crate) use embedding::embedding;
pub(crate) use finite::is_finite;
pub(crate) use given_grads::{upstream, with_grads};
pub(crate) use linear::linear;
pub(crate) use low_rank::{LowRank, Split};
pub(crate) use matrix::{Matrix, Quantized};
pub(crate) use merge::merge;
pub(crate) use norm::{layer_norm, rms_norm};
pub(crate) use rope::{rope, Rope};
pub(crate) use shape::{checked_elem_count, checked_product};
pub(crate) use softmax::softmax_last_dim;
