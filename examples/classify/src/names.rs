//! The names that an encoder's tensors have in files of different origin.

use crate::config::Config;
use crate::Result;
use candle_core::DType;
use loralib::utils::StateDict;

/// The encoder's tensors, without the prefix of a model with a head, and with the norms' newer names.
/// An error for a tensor that would be ignored.
pub fn own_names(tensors: StateDict, config: &Config) -> Result<StateDict> {
    let mut own = StateDict::new();
    for (name, tensor) in tensors {
        let short = ["bert.", "roberta."].iter().find_map(|prefix| name.strip_prefix(prefix));
        let short = short.unwrap_or(&name);
        let short = short.replace("LayerNorm.gamma", "LayerNorm.weight");
        let short = short.replace("LayerNorm.beta", "LayerNorm.bias");
        // Heads of other tasks, and what is no parameter.
        let (first, rest) = short.split_once('.').unwrap_or((&short, ""));
        if matches!(first, "pooler" | "cls" | "lm_head" | "classifier") || rest == "position_ids" {
            continue;
        }
        let known = match rest.strip_prefix("layer.").and_then(|rest| rest.split_once('.')) {
            Some((layer, _)) if first == "encoder" => {
                layer.parse().is_ok_and(|layer: usize| layer < config.num_hidden_layers)
            }
            _ => first == "embeddings",
        };
        if !known {
            return Err(format!("no place in this model for {name:?} {:?}", tensor.dims()).into());
        }
        if own.insert(short, tensor.to_dtype(DType::F32)?).is_some() {
            return Err(format!("{name:?} is there with and without a prefix").into());
        }
    }
    Ok(own)
}
