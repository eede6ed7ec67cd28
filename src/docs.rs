//! Pages beside the API.

#[doc = include_str!("../docs/coming-from-loralib.md")]
pub mod coming_from_loralib {}

#[doc = include_str!("../docs/fine-tune-a-language-model.md")]
pub mod fine_tune_a_language_model {}

#[doc = include_str!("../docs/objectives.md")]
pub mod objectives {}

#[doc = include_str!("../docs/candle-transformers.md")]
pub mod candle_transformers {}

#[doc = include_str!("../docs/peft.md")]
pub mod peft {}

#[doc = include_str!("../docs/formats.md")]
pub mod formats {}

#[doc = include_str!("../docs/data-parallel.md")]
pub mod data_parallel {}

#[doc = include_str!("../docs/combinations.md")]
pub mod combinations {}

#[doc = include_str!("../DESIGN.md")]
pub mod design {}

#[doc = include_str!("../benches/README.md")]
pub mod benchmarks {}
