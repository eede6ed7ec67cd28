//! What to train, what to save, and how it is written and read.

mod checkpoint;
mod config_json;
mod file;
mod state_dict;
mod trainable;
mod var_builder;

pub use checkpoint::{load_checkpoint, read_state_dict, save_state_dict, Checkpoint};
pub use state_dict::{load_state_dict, lora_state_dict, LoadReport, StateDict, Strict};
pub use trainable::{mark_only_lora_as_trainable, missing_grads, Bias, Trainable};
pub use var_builder::var_builder;
