//! Whether square experts are (experts, out, in) or (experts, in, out): as another parameter of their module, since
//! PEFT transposes all of a module's or none.

use crate::layers::LayerKind;
use crate::utils::names::{join, split};
use crate::utils::{AdapterConfig, StateDict};

/// Sets `fan_in_fan_out` of square parameters that have it not, where another parameter of the module tells. `dims`
/// gives the base's shapes.
pub(crate) fn with_orientations(
    mut config: AdapterConfig,
    adapter: &StateDict,
    dims: impl Fn(&str) -> Option<Vec<usize>>,
) -> AdapterConfig {
    // The inputs and outputs of each parameter.
    let sizes = |path: &str| {
        let inputs = adapter.get(&join(path, "lora_A"))?.dims().get(2).copied()?;
        Some((inputs, adapter.get(&join(path, "lora_B"))?.dims().get(1).copied()?))
    };
    let transposed = |path: &str| {
        let (inputs, outs) = sizes(path).filter(|(inputs, outs)| inputs != outs)?;
        match dims(path)?[..] {
            [_, rows, columns] => Some((rows, columns) == (inputs, outs)),
            _ => None,
        }
    };
    let parameters: Vec<String> = config
        .layers
        .iter()
        .filter(|(_, layer)| matches!(layer.kind, Some(LayerKind::Parameter { .. })))
        .map(|(path, _)| path.clone())
        .collect();
    for (path, layer) in &mut config.layers {
        let square = sizes(path).is_some_and(|(inputs, outs)| inputs == outs);
        if square && parameters.contains(path) && layer.fan_in_fan_out.is_none() {
            let mut siblings = parameters.iter().filter(|other| split(other).0 == split(path).0);
            layer.fan_in_fan_out = siblings.find_map(|other| transposed(other));
        }
    }
    config
}
