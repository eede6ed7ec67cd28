//! Merges an adapter into its base by name, without the model: the result is a plain checkpoint that
//! needs this crate no longer.

mod change;
mod experts;
mod files;
mod new_tensors;
mod plan;
mod tensors;
mod weight;

pub use crate::weights::{
    add_weighted, add_weighted_with, AddWeightedConfig, CombinationType, MajoritySignMethod,
};
pub use files::{merge_files, MergeProgress};
pub use new_tensors::NewTensors;
pub(crate) use plan::{Additions, Plan};
pub use tensors::merge_into;
