//! Losses that teach a model which of its answers people prefer. Names and defaults are those of TRL 1.16.

mod dpo;
mod grpo;
mod kto;
mod orpo;
mod pairs;
mod scores;

pub use dpo::{dpo_loss, DpoConfig, DpoLossType};
pub use grpo::{
    group_advantages, grpo_loss, GrpoBatch, GrpoConfig, GrpoLossType, ImportanceSamplingLevel,
    ScaleRewards,
};
pub use kto::{kto_loss, KtoConfig, KtoLoss};
pub use orpo::orpo_loss;
pub use pairs::{PairLogProbs, PreferenceLoss};
