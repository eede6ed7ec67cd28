//! What candle lacks or gets wrong: products that cost a frozen weight no gradient, and
//! convolutions in 1, 2 and 3 dimensions whose gradients are right.

mod backend;
mod conv;
mod convolve;
mod dropout;
mod embedding;
mod frozen;
mod gather;
mod in_place;
mod linear;
mod merge;
mod op;
mod unfold;

pub(crate) use backend::{wide, Term};
pub(crate) use conv::{conv, Geometry};
pub(crate) use dropout::dropout_mask;
pub(crate) use embedding::embedding;
pub(crate) use frozen::{biased, plus, times_frozen};
pub(crate) use linear::linear;
pub(crate) use merge::{is_finite, merge};
