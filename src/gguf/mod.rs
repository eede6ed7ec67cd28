//! GGUF files, the format of llama.cpp: quantised models as the frozen base of an adapter.
//!
//! ```no_run
//! # fn main() -> loralib::Result<()> {
//! use candle_core::{DType, Device};
//! use loralib::{self as lora, gguf, LoraConfig};
//! # struct Config;
//! # impl<'de> serde::Deserialize<'de> for Config {
//! #     fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> { Ok(Self) }
//! # }
//! # struct Model;
//! # impl Model { fn new(_: &Config, _: lora::nn::VarBuilder) -> candle_core::Result<Self> { Ok(Self) } }
//! let device = Device::Cpu;
//! let file = gguf::File::open("model-q4_0.gguf")?;
//! let config: Config = file.config()?;
//!
//! // A model of candle-transformers whose code uses `lora::nn`. The base stays as it is in the file.
//! let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
//! let adapter = lora::Adapter::new(cfg).targets(["q_proj", "v_proj"]);
//! let vb = adapter.var_builder(file.var_builder(DType::F32, &device)?);
//! let model = Model::new(&config, vb)?;
//! adapter.check()?;
//!
//! // After training: for `llama-cli --model model-q4_0.gguf --lora adapter.gguf`, and back.
//! adapter.save_gguf("adapter.gguf", &file)?;
//! let adapter = lora::Adapter::load_gguf("adapter.gguf", &file, &device)?;
//!
//! // Or merged, in a dtype that keeps the update.
//! let dtype = candle_core::quantized::GgmlDType::Q8_0;
//! gguf::merge(&file, &adapter.weights()?, "merged.gguf", dtype, |_| {})?;
//! # let _ = model; Ok(()) }
//! ```

mod adapter;
mod architecture;
mod config;
mod convert;
mod file;
mod file_var_builder;
mod ggml_dtype;
mod header;
mod merge;
mod metadata;
mod model;
mod names;
mod reader;
mod rows;
mod tokenizer;
mod var_builder;
mod writer;

pub use adapter::{load_adapter, save_adapter};
pub use file::File;
pub use merge::{merge, merge_to_safetensors, MergeOptions};
pub use var_builder::var_builder;
