//! What training a model takes besides its layers. Each piece can be used alone.

mod adamw;
mod contrastive_loss;
mod grads;
mod linear_cross_entropy;
mod parallel;
mod schedule;
mod state;

pub use adamw::AdamW;
pub use contrastive_loss::contrastive_loss;
pub use grads::{add_grads, clip_grad_norm};
pub use linear_cross_entropy::{linear_cross_entropy, linear_cross_entropy_with};
pub use parallel::{Fingerprint, FlatGrads, Process, Sampler};
pub use schedule::Schedule;
