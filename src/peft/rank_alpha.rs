//! The common rank and alpha of an adapter's layers, and the layers that differ.

use crate::layers::LayerKind;
use crate::utils::{AdapterConfig, LayerConfig};

/// `common` if a layer has this rank and alpha, else the most frequent ones; `None` without layers.
pub(super) fn common_or_most_frequent(
    common: (usize, f64),
    values: impl Iterator<Item = (usize, f64)>,
) -> Option<(usize, f64)> {
    let mut counts: Vec<((usize, f64), usize)> = vec![];
    for value in values {
        match counts.iter_mut().find(|(seen, _)| *seen == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    if counts.iter().any(|(value, _)| *value == common) {
        return Some(common);
    }
    let most = counts.iter().map(|(_, count)| *count).max()?;
    counts.into_iter().find(|(_, count)| *count == most).map(|(value, _)| value)
}

/// The configuration with the kinds of all layers, and the ranks and alphas that are not the common ones.
pub(crate) fn with_layers(
    mut config: AdapterConfig,
    layers: Vec<(String, LayerKind, usize, f64)>,
) -> AdapterConfig {
    let common = (config.lora.r, config.lora.lora_alpha);
    let values = layers.iter().map(|&(_, _, r, alpha)| (r, alpha));
    let (r, alpha) = common_or_most_frequent(common, values).unwrap_or(common);
    (config.lora.r, config.lora.lora_alpha) = (r, alpha);
    let layer = |(path, kind, own_r, own_alpha)| {
        let layer = LayerConfig {
            kind: Some(kind),
            r: (own_r != r).then_some(own_r),
            lora_alpha: (own_alpha != alpha).then_some(own_alpha),
            fan_in_fan_out: None,
        };
        (path, layer)
    };
    config.layers = layers.into_iter().map(layer).collect();
    config
}
