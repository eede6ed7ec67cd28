//! What training a model takes besides its layers.

mod linear_cross_entropy;

pub use linear_cross_entropy::linear_cross_entropy;
