//! What a file gives a model.

mod damaged;
mod errors;
mod fidelity;
