//! What training a model takes besides its layers. Each piece can be used alone.

mod adamw;
mod embeddings;
mod grads;
mod labelled;
mod linear_cross_entropy;
mod linear_log_probs;
mod parallel;
mod preference;
mod schedule;
mod state;

pub use adamw::AdamW;
pub use embeddings::{contrastive_loss, matryoshka_loss, normalize, Pooling};
pub use grads::{add_grads, clip_grad_norm};
pub use linear_cross_entropy::{linear_cross_entropy, linear_cross_entropy_with};
pub use linear_log_probs::{linear_log_probs, linear_log_probs_with};
pub use parallel::{Fingerprint, FlatGrads, Process, Sampler};
pub use preference::{
    dpo_loss, group_advantages, grpo_loss, kto_loss, orpo_loss, DpoConfig, DpoLossType, GrpoBatch,
    GrpoConfig, GrpoLossType, ImportanceSamplingLevel, KtoConfig, KtoLoss, PairLogProbs,
    PreferenceLoss, ScaleRewards,
};
pub use schedule::Schedule;
