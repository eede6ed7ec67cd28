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
//! # let adapter = loralib::StateDict::new();
//! use loralib::{layers::LayerKind, peft, AdapterConfig};
//! let cfg = loralib::LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
//!
//! // Layers that are not a Linear, by the end of their path.
//! let config = AdapterConfig::from(cfg)
//!     .with_layer("c_attn", LayerKind::MergedLinear(vec![true, false, true]))
//!     .with_layer("wte", LayerKind::Embedding);
//! peft::save_pretrained("adapter", &adapter, &config)?;
//!
//! let (config, tensors) = peft::load_pretrained("adapter", &candle_core::Device::Cpu)?;
//! let layer = config.lora_config("transformer.h.0.attn.c_attn"); // its rank and alpha
//!
//! // Into an existing model, with ranks and scalings compared.
//! let vars = candle_nn::VarMap::new();
//! let report = peft::load_adapter("adapter", &vars, &config, loralib::Strict::Yes)?;
//! # let _ = (layer, tensors, report); Ok(()) }
//! ```

mod conv;
mod convert;
mod entries;
mod experts;
mod factors;
mod files;
mod keys;
mod load;
mod load_adapter;
mod merged;
mod module_pattern;
mod modules;
mod pairs;
mod parameters;
mod patterns;
mod rank_alpha;
mod read_config;
mod read_fresh;
mod save;
mod tokens;
mod uniform;
mod write_config;

pub(crate) use convert::{from_peft, to_peft};
pub(crate) use factors::{plain_alpha, Factors};
pub(crate) use files::{config_file, has_tensors, malformed};
pub(crate) use keys::adapter_name;
pub(crate) use load::kind;
pub use load::{load_pretrained, load_pretrained_as};
pub use load_adapter::load_adapter;
pub(crate) use load_adapter::load_beside_base;
pub(crate) use patterns::Patterns;
pub(crate) use rank_alpha::with_layers;
pub(crate) use read_config::{object, read_saved_config, without_mark, Json};
pub(crate) use read_fresh::{read_fresh, Modules};
pub use save::{save_plain, save_pretrained};
pub(crate) use uniform::uniform;
pub(crate) use write_config::{shortest, write_config};
