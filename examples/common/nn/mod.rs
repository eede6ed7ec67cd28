//! What a transformer needs beside its linear layers, with gradients: candle's own operations cut the
//! graph, or take many passes and a gradient for what is frozen.

pub mod attention;
mod composed;
pub mod computed;
pub mod exp;
mod heads;
pub mod norm;
pub mod ops;
pub mod rows;
