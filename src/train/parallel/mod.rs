//! Data-parallel training over any engine that adds arrays of several processes: each rank computes the
//! gradients of its share of a batch, and only the adapter's gradients travel.

mod fingerprint;
mod flat_grads;
mod process;
mod sampler;

pub use fingerprint::Fingerprint;
pub use flat_grads::FlatGrads;
pub use process::Process;
pub use sampler::Sampler;
