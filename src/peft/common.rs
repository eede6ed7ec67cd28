//! The rank and alpha that an adapter's layers have in common, and the layers that differ.

use super::{Kind, Layer, PeftConfig};
use std::collections::BTreeMap;

/// The common rank and alpha where a layer has them, else those met most; `None` without layers.
pub(super) fn common_or_most(
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

/// The configuration with the layers that differ from the common options.
pub(super) fn settle(
    mut config: PeftConfig,
    layers: Vec<(String, Kind, usize, f64)>,
) -> PeftConfig {
    let common = (config.lora.r, config.lora.lora_alpha);
    let values = layers.iter().map(|&(_, _, r, alpha)| (r, alpha));
    let (r, alpha) = common_or_most(common, values).unwrap_or(common);
    (config.lora.r, config.lora.lora_alpha) = (r, alpha);
    let layers: BTreeMap<_, _> = layers
        .into_iter()
        .map(|(path, kind, own_r, own_alpha)| {
            let r = (own_r != r).then_some(own_r);
            (path, Layer { kind, r, lora_alpha: (own_alpha != alpha).then_some(own_alpha) })
        })
        .collect();
    let (plain, own): (BTreeMap<_, _>, _) =
        layers.into_iter().partition(|(_, layer)| *layer == Layer::default());
    config.layers = own;
    for (path, layer) in plain {
        // The end of its path may be another layer's whole path.
        if config.layer(&path).is_some() {
            config.layers.insert(path, layer);
        }
    }
    config
}
