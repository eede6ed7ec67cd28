//! Training: the examples' models, which agree with transformers', and data-parallel runs.

#[path = "../../examples/classify/src/bert.rs"]
mod bert;
#[path = "../../examples/classify/src/classifier.rs"]
mod classifier;
#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code)] // the example uses more of it
#[path = "../../examples/classify/src/config.rs"]
mod config;
#[allow(dead_code)] // the example uses more of it
#[path = "../../examples/finetune/gpt2.rs"]
mod gpt2;
#[path = "../../examples/classify/src/names.rs"]
mod names;

mod data_parallel;
mod decoder;
mod embeddings;
mod encoders;
mod loss_head;
mod preference;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;
