//! Adapters with initial factors as plain ones.

use super::names::{is_initial, is_lora, join, split};
use super::{AdapterConfig, LayerConfig, StateDict};
use crate::layers::{same_scaling, LayerKind, INITIAL_A, INITIAL_B};
use crate::ops::joined;
use crate::{Error, Result};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// The adapter with `B·A − B₀·A₀` of each layer as one pair of factors, of twice the rank and the same scaling.
pub(crate) fn plain<'a>(
    tensors: &'a StateDict,
    config: &'a AdapterConfig,
) -> Result<(Cow<'a, StateDict>, Cow<'a, AdapterConfig>)> {
    let has_initial: BTreeSet<&str> =
        tensors.keys().filter(|name| is_initial(name)).map(|name| split(name).0).collect();
    if has_initial.is_empty() {
        return Ok((Cow::Borrowed(tensors), Cow::Borrowed(config)));
    }
    let paths: BTreeSet<&str> =
        tensors.keys().filter(|name| is_lora(name)).map(|name| split(name).0).collect();
    config.check_used(paths.iter().copied())?;
    let mut plain = tensors.clone();
    plain.retain(|name, _| !is_initial(name));
    let mut config = config.clone();
    let mut layers = paths.iter().map(|path| (*path, own(path, &config))).collect::<Vec<_>>();
    for (path, layer) in layers.iter_mut().filter(|(path, _)| has_initial.contains(path)) {
        if let Some(kind) = layer.kind.as_ref().filter(|kind| **kind != LayerKind::Linear) {
            let reason = format!("only a linear layer has initial factors, not a {kind:?}");
            return Err(Error::tensor(join(path, INITIAL_A), reason));
        }
        let tensor = |last| {
            let name = join(path, last);
            let missing =
                || Error::tensor(&name, "it is missing, but the layer has initial factors");
            tensors.get(&name).ok_or_else(missing)
        };
        let factors = [tensor("lora_A")?, tensor("lora_B")?];
        let initial = [tensor(INITIAL_A)?, tensor(INITIAL_B)?];
        let [a, b] =
            joined(factors, initial).map_err(|e| Error::tensor(join(path, INITIAL_A), e))?;
        plain.extend([(join(path, "lora_A"), a), (join(path, "lora_B"), b)]);
        let cfg = config.lora_config(path);
        layer.r = Some(2 * cfg.r);
        layer.lora_alpha = Some(same_scaling(cfg.lora_alpha, cfg.r, 2 * cfg.r, cfg.rslora));
    }
    let common = layers.first().map(|(_, layer)| (layer.r, layer.lora_alpha));
    if let Some((Some(r), Some(alpha))) = common {
        (config.lora.r, config.lora.lora_alpha) = (r, alpha);
    }
    config.layers = layers.into_iter().map(|(path, layer)| (path.to_owned(), layer)).collect();
    Ok((Cow::Owned(plain), Cow::Owned(config)))
}

/// The options of a layer, none of them the adapter's.
fn own(path: &str, config: &AdapterConfig) -> LayerConfig {
    let cfg = config.lora_config(path);
    let declared = config.layer(path).map(|(_, layer)| layer.clone()).unwrap_or_default();
    LayerConfig { r: Some(cfg.r), lora_alpha: Some(cfg.lora_alpha), ..declared }
}
