//! Adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`, which
//! Python's `peft` and servers such as vLLM read.
//!
//! In memory tensors have loralib's names and shapes, on disk PEFT's. The conversion keeps the update:
//!
//! | layer | in PEFT's format |
//! |---|---|
//! | [`Linear`](crate::Linear), [`Embedding`](crate::Embedding) | the same factors |
//! | [`MergedLinear`](crate::MergedLinear) with e enabled splits | one Linear of rank r·e with a block-diagonal B |
//! | convolution with a kernel of k | rank r·k (1d), r·k² (2d and 3d), with a block-diagonal A; PEFT's own keep their rank |
//! | parameter, A (experts, r, in), B (experts, out, r) | `target_parameters`: A (experts·r, in), B (out, r·experts) |
//! | convolution of g groups | g² times that rank, with an A of mostly zeros: with many groups merge instead |
//!
//! `lora_bias` is the tensor `lora_bias` beside the factors, `trainable_token_indices` the rows `trainable_tokens` of a
//! table. These two and parameters are read, merged and saved, and not trained. [This table](crate::docs::peft) lists
//! all options.
//!
//! Adapters that this crate saved load with their original factors. PEFT's own convolutions load with rank r
//! (1d: r/k, rounded up). PEFT's convolutions of several groups are an error: their update mixes the inputs
//! of all groups, which no kernel of the base's shape does.
//!
//! ```no_run
//! # fn main() -> loralib::Result<()> {
//! # let adapter = loralib::utils::StateDict::new();
//! use loralib::{adapter::AdapterConfig, formats::peft, layers::LayerKind, LoraWeights};
//! let cfg = loralib::LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
//!
//! // Layers that are not a Linear, by the end of their path.
//! let config = AdapterConfig::from(cfg)
//!     .with_layer("c_attn", LayerKind::MergedLinear(vec![true, false, true]))
//!     .with_layer("wte", LayerKind::Embedding);
//! peft::save("adapter", &LoraWeights::new(&config, adapter)?)?;
//!
//! let weights = peft::load("adapter", &candle_core::Device::Cpu)?;
//! let layer = weights.lora_config("transformer.h.0.attn.c_attn"); // its rank and alpha
//!
//! // Into an existing model, with ranks and scalings compared.
//! let vars = candle_nn::VarMap::new();
//! let report = loralib::utils::load_weights(&weights, &vars, &config, loralib::Strict::Yes)?;
//! # let _ = (layer, report); Ok(()) }
//! ```

mod config;
mod fields;
mod folder;
mod keys;
mod load;
mod pairs;
mod parameters;
mod patterns;
mod save;
mod save_config;
mod tokens;

pub(crate) use config::{new_adapter, Modules, PeftConfig};
pub(crate) use fields::Fields;
pub(crate) use folder::{config_file, malformed};
pub(crate) use keys::adapter_name;
pub use load::load;
pub(crate) use patterns::Patterns;
pub use save::{save, save_plain};
pub(crate) use save_config::{config_json, shortest};
