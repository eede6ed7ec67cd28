//! loralib's utilities: what to train, what to save, and checkpoint files.

mod check_grads;
mod checkpoint;
mod half_var_builder;
mod magnitudes;
mod safetensors_var_builder;
mod seeded;
mod state_dict;
mod summary;
mod trainable;
mod var_builder;

pub use crate::files::StateDict;
pub use crate::weights::Bias;
pub use check_grads::check_grads;
pub use checkpoint::{load_checkpoint, load_weights, read_state_dict, save_state_dict, Checkpoint};
pub use half_var_builder::half_var_builder;
pub use safetensors_var_builder::safetensors_var_builder;
pub use seeded::seeded;
pub use state_dict::{load_state_dict, lora_state_dict, LoadReport, Strict};
pub use summary::{summary, AdaptedLayer, Summary};
pub(crate) use trainable::{is_initial, variables};
pub use trainable::{mark_only_lora_as_trainable, missing_grads, Trainable};
pub use var_builder::var_builder;
pub(crate) use var_builder::var_builder_with;
