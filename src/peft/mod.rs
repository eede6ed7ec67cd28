//! Adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`,
//! as Python's `peft` and servers such as vLLM read it.
//!
//! Tensors are in loralib's names and shapes on this side, in PEFT's on the disk, and each
//! conversion keeps the update: a [`MergedLinear`](crate::MergedLinear) with e enabled parts is one
//! PEFT Linear of rank r·e, whose B is block-diagonal; a convolution is one of rank r·k² (2d),
//! r·k² (3d) or r·k (1d), whose A is block-diagonal; one of g groups has g² times that rank, and A is
//! mostly zeros: merge those of many groups into their base instead. What was saved so is recognized
//! when it is loaded, and comes back as it was. PEFT's own convolutions come as loralib's of rank r
//! (1d: r/k, rounded up), but for those of several groups, whose update mixes the inputs of all
//! groups: no kernel of the base's shape does that, and they are an error.
//!
//! ```no_run
//! # fn main() -> loralib::Result<()> {
//! # let adapter = loralib::StateDict::new();
//! use loralib::peft::{self, Kind, PeftConfig};
//! let cfg = loralib::LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
//!
//! // What is not a Linear says what it is, by the end of its path.
//! let config = PeftConfig::from(cfg)
//!     .with("c_attn", Kind::MergedLinear(vec![true, false, true]))
//!     .with("wte", Kind::Embedding);
//! peft::save_pretrained("adapter", &adapter, &config)?;
//!
//! let (config, tensors) = peft::load_pretrained("adapter", &candle_core::Device::Cpu)?;
//! let layer = config.lora_config("transformer.h.0.attn.c_attn"); // its own rank and alpha
//!
//! // Into a model that is there already, where ranks and scalings are compared.
//! let vars = candle_nn::VarMap::new();
//! let report = peft::load_checkpoint("adapter", &vars, &config, loralib::Strict::Yes)?;
//! # let _ = (layer, tensors, report); Ok(()) }
//! ```

mod checkpoint;
mod common;
mod config;
mod conv;
mod convert;
mod keys;
mod kind;
mod load;
mod pairs;
mod pattern;
mod read_config;
mod save;
mod write_config;

pub use checkpoint::load_checkpoint;
pub use config::{Layer, PeftConfig};
pub(crate) use keys::refuse_names;
pub use kind::Kind;
pub(crate) use kind::Total;
pub use load::{load_pretrained, load_pretrained_as};
pub use save::save_pretrained;

use crate::Error;

const CONFIG: &str = "adapter_config.json";
const SAFETENSORS: &str = "adapter_model.safetensors";
const BIN: &str = "adapter_model.bin";

fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "PEFT adapter", reason: reason.to_string() }
}
