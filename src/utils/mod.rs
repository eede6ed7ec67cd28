//! loralib's utilities: what to train, what to save, and checkpoint files.

mod check_grads;
mod checkpoint;
mod magnitudes;
mod state_dict;
mod summary;
mod trainable;

pub use crate::files::StateDict;
pub use crate::weights::Bias;
pub use check_grads::check_grads;
pub use checkpoint::{load_checkpoint, load_weights, read_state_dict, save_state_dict, Checkpoint};
pub use state_dict::{load_state_dict, lora_state_dict, LoadReport, Strict};
pub use summary::{summary, AdaptedLayer, Summary};
pub(crate) use trainable::{
    is_initial, is_statistic, is_untrained, require_grads, variable, variables,
};
pub use trainable::{mark_only_lora_as_trainable, missing_grads, Trainable};
