//! Which tensors an adapter changes. The file tells the kinds of its layers.

use crate::gguf::architecture::MODEL;
use crate::gguf::file::File;
use crate::gguf::names::Names;
use crate::layers::LayerKind;
use crate::merge::Plan;
use crate::utils::names::{is_lora, split};
use crate::utils::{AdapterConfig, StateDict};
use crate::Result;
use std::collections::BTreeMap;

/// The changes by Hugging Face's names.
pub(super) fn plan(
    base: &File,
    names: &Names,
    adapter: &StateDict,
    mut config: AdapterConfig,
) -> Result<Plan> {
    let paths = || adapter.keys().filter(|name| is_lora(name)).map(|name| split(name).0);
    config.check_used(paths())?;
    let layers: BTreeMap<_, _> = paths()
        .map(|path| {
            let mut layer = config.layer(path).map(|(_, own)| own.clone()).unwrap_or_default();
            let embedding = MODEL[0].1.strip_suffix(".weight") == Some(path);
            let kind = if embedding { LayerKind::Embedding } else { LayerKind::Linear };
            layer.kind.get_or_insert(kind);
            // A file's matrices are (out, in).
            layer.fan_in_fan_out = Some(false);
            (path.to_owned(), layer)
        })
        .collect();
    config.layers = layers;
    let exists = |name: &str| names.gguf(name).is_some_and(|name| base.find(&name).is_some());
    Plan::new(adapter, config, exists)
}
