//! LoRA layers around frozen base weights.

mod adapted;
mod config;
mod conv;
mod embedding;
mod linear;
mod low_rank;
mod merged_linear;
mod mode;
mod weight;

pub use adapted::Adapted;
pub use config::LoraConfig;
pub use conv::{
    conv1d, conv1d_no_bias, conv2d, conv2d_no_bias, conv3d, conv3d_no_bias, Conv1d, Conv2d, Conv3d,
    Conv3dConfig, ConvConfig,
};
pub use embedding::{embedding, Embedding, Lookup};
pub use linear::{linear, linear_b, linear_no_bias, Dense, Linear};
pub(crate) use low_rank::{checked, LowRank};
pub use merged_linear::{merged_linear, merged_linear_no_bias, Merged, MergedLinear};
#[doc(hidden)] // for lora_module!
pub use mode::{without_mode, WithoutMode};
pub use mode::{LoraModule, Mode};
