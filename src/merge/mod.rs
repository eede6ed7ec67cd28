//! Merges an adapter into its base by name, without the model: the result is a plain checkpoint that
//! needs this crate no longer.

mod add_weighted;
mod change;
mod files;
mod orientation;
mod parameter;
mod plan;
mod tensors;
mod tied;
mod weight;

pub use add_weighted::add_weighted;
pub use files::{merge_files, MergeProgress};
pub(crate) use orientation::with_orientations;
pub(crate) use plan::Plan;
pub use tensors::merge_into;
