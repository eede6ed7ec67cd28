//! LoRA layers around frozen base weights.

mod adapted;
mod base;
pub(crate) mod claims;
mod config;
mod conv;
mod embedding;
mod init;
mod kind;
mod linear;
mod merged_linear;
mod mode;
mod weight;

pub use adapted::{Adapted, Kind};
pub(crate) use base::{alias_quantized, dequantized, on_device, placeholder};
pub use config::LoraConfig;
pub(crate) use conv::adapt as adapt_conv;
pub use conv::{
    conv1d, conv1d_no_bias, conv2d, conv2d_no_bias, conv3d, conv3d_no_bias, Conv1d, Conv2d, Conv3d,
    Conv3dConfig, ConvConfig,
};
pub(crate) use embedding::adapt as adapt_embedding;
pub use embedding::{embedding, Embedding, EmbeddingKind};
pub use kind::LayerKind;
pub(crate) use kind::Total;
pub(crate) use linear::adapt as adapt_linear;
pub use linear::{linear, linear_b, linear_no_bias, Linear, LinearKind};
pub(crate) use merged_linear::adapt as adapt_merged_linear;
pub use merged_linear::{merged_linear, merged_linear_no_bias, MergedLinear, MergedLinearKind};
#[doc(hidden)] // for lora_module!
pub use mode::{without_mode, WithoutMode};
pub use mode::{LoraModule, Mode};
pub(crate) use weight::{Placement, SharedWeight, Weight};
