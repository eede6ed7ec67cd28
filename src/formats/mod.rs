//! Adapters in the formats of other programs: PEFT, diffusers, kohya's sd-scripts and MLX.
//!
//! Each has a `load`, which gives a [`LoraWeights`](crate::LoraWeights), and a `save` of one, so that an adapter of one
//! format is written in another. A file for a pipeline has the layers of several models: their names begin with the
//! component, such as `unet.` or `text_encoder.`; [`component`](crate::LoraWeights::component) takes one of them out.
//!
//! ```no_run
//! # fn main() -> loralib::Result<()> {
//! # let base = candle_nn::VarBuilder::zeros(candle_core::DType::F32, &candle_core::Device::Cpu);
//! use loralib::formats::{diffusers, kohya};
//! let device = candle_core::Device::Cpu;
//! let weights = diffusers::load("pytorch_lora_weights.safetensors", &device)?;
//! kohya::save("lora.safetensors", &weights)?;
//!
//! // One model of the pipeline, in training or merged for any code of candle's.
//! let adapter = loralib::Adapter::from_weights(&weights.component("unet")?)?;
//! let vb = adapter.merged(base)?;
//! # let _ = vb; Ok(()) }
//! ```

pub mod diffusers;
pub mod kohya;
mod layers;
pub mod mlx;
pub mod peft;
pub(crate) mod shapes;
