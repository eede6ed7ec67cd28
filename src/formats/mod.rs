//! Adapters in the formats of other programs: diffusers, kohya's sd-scripts and MLX.
//!
//! Each has a `load`, which gives a configuration and factors by the crate's names, and a `save`. A file for a
//! pipeline has the layers of several models: their names begin with the component, such as `unet.` or
//! `text_encoder.`; [`of_component`] takes one of them out, and [`in_component`] is its inverse.
//!
//! ```no_run
//! # fn main() -> loralib::Result<()> {
//! use loralib::formats::{diffusers, kohya, of_component};
//! let device = candle_core::Device::Cpu;
//! let (config, adapter) = diffusers::load("pytorch_lora_weights.safetensors", &device)?;
//! let (unet_config, unet) = of_component("unet", &config, &adapter)?;
//! kohya::save("lora.safetensors", &adapter, &config)?;
//! # let _ = (unet_config, unet); Ok(()) }
//! ```

mod component;
pub mod diffusers;
pub mod kohya;
mod layers;
pub mod mlx;
mod pairs;

pub use component::{in_component, of_component};
