//! What to train, what to save, and checkpoint files.

mod adapter_config;
mod bias;
mod check_grads;
pub(crate) mod checkpoint;
mod factors;
mod fnv;
mod initial;
mod magnitudes;
pub(crate) mod names;
mod state_dict;
mod summary;
mod trainable;
mod wrappers;

pub use adapter_config::{AdapterConfig, LayerConfig};
pub use bias::Bias;
pub use check_grads::check_grads;
pub use checkpoint::{
    load_checkpoint, read_adapter, read_state_dict, read_torch_entry, save_state_dict, Checkpoint,
};
pub(crate) use factors::{check_magnitudes, check_same_options, factors};
pub(crate) use fnv::{fnv1a, fnv1a_of};
pub(crate) use initial::plain;
pub(crate) use state_dict::check_finite;
pub use state_dict::{load_state_dict, lora_state_dict, LoadReport, StateDict, Strict};
pub use summary::{summary, AdaptedLayer, Summary};
pub use trainable::{mark_only_lora_as_trainable, missing_grads, Trainable};
pub(crate) use trainable::{variable, variables};
pub use wrappers::strip_wrappers;
