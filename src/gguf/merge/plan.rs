//! Which tensors of a file an adapter changes. The file tells the kinds of its layers.

use crate::gguf::architecture::MODEL;
use crate::gguf::file::File;
use crate::gguf::names::Names;
use crate::layers::LayerKind;
use crate::merge::{Additions, Plan};
use crate::weights::LoraWeights;
use crate::Result;

/// The adapter with the kinds of its layers, which the file tells, and its matrices as (out, in).
pub(super) fn with_kinds(adapter: &LoraWeights) -> LoraWeights {
    let mut adapter = adapter.clone();
    for (path, layer) in &mut adapter.layers {
        let embedding = MODEL[0].1.strip_suffix(".weight") == Some(path);
        let kind = if embedding { LayerKind::Embedding } else { LayerKind::Linear };
        layer.kind.get_or_insert(kind);
        layer.fan_in_fan_out = Some(false);
    }
    adapter
}

/// The changes by Hugging Face's names.
pub(super) fn plan(base: &File, names: &Names, adapter: &LoraWeights) -> Result<Plan> {
    let exists = |name: &str| names.gguf(name).is_some_and(|name| base.find(&name).is_some());
    Plan::new(adapter, exists, |_| None, Additions::None)
}
