//! Adapters in the formats of other programs: diffusers, kohya's sd-scripts and MLX.
//!
//! Each has a `load`, which gives a configuration and factors by the crate's names, and a `save`. A file for a
//! pipeline has the layers of several models: their names begin with the component, such as `unet.` or
//! `text_encoder.`; [`of_component`] takes one of them out, and [`in_component`] is its inverse.
//!
//! ```no_run
//! # fn main() -> loralib::Result<()> {
//! # let base = candle_nn::VarBuilder::zeros(candle_core::DType::F32, &candle_core::Device::Cpu);
//! use loralib::formats::{diffusers, kohya, of_component};
//! let device = candle_core::Device::Cpu;
//! let (config, tensors) = diffusers::load("pytorch_lora_weights.safetensors", &device)?;
//! kohya::save("lora.safetensors", &tensors, &config)?;
//!
//! // One model of the pipeline, in training or merged for any code of candle's.
//! let (config, tensors) = of_component("unet", &config, &tensors)?;
//! let adapter = loralib::Adapter::from_tensors(config, tensors)?;
//! let vb = adapter.merged(base)?;
//! # let _ = vb; Ok(()) }
//! ```

mod component;
pub mod diffusers;
pub mod kohya;
mod layers;
pub mod mlx;
mod pairs;

pub use component::{in_component, of_component, COMPONENTS};
