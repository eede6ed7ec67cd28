//! Adapters in llama.cpp's form: F32 factors by the base's names of weights, with the rows of q and k as the base has
//! them.

mod load;
mod place;
mod save;

pub use load::load_adapter;
pub use save::save_adapter;
