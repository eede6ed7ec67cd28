//! An adapter's weights as one value, which every format reads and writes.
//!
//! A file becomes a [`LoraWeights`] at the door of its format, where names are taken apart and everything is checked
//! once: factors come in pairs, ranks fit the options, and what the options promise is there. What follows, merging,
//! sums, conversions, a model's layers, takes the value by reference and asks it for layers, not for names.

mod add_weighted;
mod bias;
mod combination;
mod component;
mod config;
pub(crate) mod conv;
mod experts;
mod file;
mod foreign;
mod layer;
mod lora_weights;
mod metadata;
pub(crate) mod pair;
mod products;
mod resize;
mod selection;
mod state_dict;
mod tied;
mod uniform;

pub use add_weighted::add_weighted;
pub use bias::Bias;
pub use combination::{add_weighted_with, AddWeightedConfig, CombinationType, MajoritySignMethod};
pub(crate) use component::{has_component, NO_COMPONENT};
pub use config::{AdapterConfig, LayerConfig};
pub use experts::ExpertNames;
pub(crate) use experts::{parameter_of, ExpertProjection};
pub(crate) use file::{load, parsed_config, save};
pub(crate) use foreign::{
    flattened_hint, foreign_file, origin, refuse_other_methods, refuse_other_names,
};
pub(crate) use layer::Factors;
pub use layer::LayerWeights;
pub use lora_weights::LoraWeights;
pub(crate) use lora_weights::{is_close, is_equal, TokenRows};
pub use resize::Resized;
pub(crate) use selection::contains;
pub(crate) use tied::{
    has_other_head, head_of, head_weight, is_input_table, is_output_head, is_tied, table_of,
    untied_table,
};
pub(crate) use uniform::{common_alpha, common_rank_alpha, rescaled, uniform};
