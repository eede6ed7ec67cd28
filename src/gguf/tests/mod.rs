//! What a file gives a model.

mod adapters;
mod damaged;
mod errors;
mod fidelity;
mod merged;
mod to_safetensors;
