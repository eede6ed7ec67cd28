//! LoRA layers around frozen base weights.

mod adapt;
mod adapted;
mod batch_update;
pub(crate) mod binding;
mod config;
mod conv;
mod embedding;
mod init;
mod init_lora_weights;
mod initial;
mod kind;
mod linear;
mod merged_linear;
mod mode;
mod names;
mod placement;
mod token_rows;
mod weight;

pub(crate) use adapt::adapt;
pub use adapted::Adapted;
pub(crate) use config::same_scaling;
pub use config::LoraConfig;
pub(crate) use conv::ConvConfig;
pub use conv::{
    conv1d, conv1d_no_bias, conv2d, conv2d_no_bias, conv3d, conv3d_no_bias, Conv1d, Conv2d, Conv3d,
    Conv3dConfig,
};
pub(crate) use embedding::EmbeddingKind;
pub use embedding::{embedding, Embedding};
pub(crate) use init::initial_magnitude;
pub use init_lora_weights::InitLoraWeights;
pub use kind::LayerKind;
pub(crate) use kind::Total;
pub use linear::{linear, linear_b, linear_no_bias, Linear};
pub(crate) use linear::{projection, LinearKind};
pub use merged_linear::{merged_linear, merged_linear_no_bias, MergedLinear};
#[doc(hidden)] // for lora_module!
pub use mode::{without_mode, WithoutMode};
pub use mode::{LoraModule, Mode};
pub(crate) use names::{ends_in, is_within, without_conv, Part};
pub(crate) use placement::Placement;
pub(crate) use weight::{SharedWeight, View, Weight, WeightTensors};
