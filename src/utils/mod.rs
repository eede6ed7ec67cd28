//! What to train, what to save, and how it is written and read.

mod add_weighted;
mod bias;
mod checkpoint;
mod config_json;
pub(crate) mod file;
mod merge_files;
mod merge_into;
mod merge_plan;
mod merged_weight;
mod names;
mod safetensors;
mod seeded;
mod shard;
mod shards;
mod state_dict;
mod summary;
mod torch;
mod trainable;
mod var_builder;

pub use add_weighted::add_weighted;
pub use bias::Bias;
pub(crate) use checkpoint::read;
pub use checkpoint::{load_checkpoint, read_state_dict, save_state_dict, Checkpoint};
pub use merge_files::{merge_files, Progress};
pub use merge_into::{merge_into, Base};
pub(crate) use names::{is_lora, is_within, join, split};
pub(crate) use safetensors::serialize;
pub use seeded::seeded;
pub(crate) use shards::Shards;
pub(crate) use state_dict::elements;
pub use state_dict::{load_state_dict, lora_state_dict, LoadReport, StateDict, Strict};
pub use summary::{summary, AdaptedLayer, Summary};
pub use trainable::{mark_only_lora_as_trainable, missing_grads, Trainable};
pub use var_builder::var_builder;
