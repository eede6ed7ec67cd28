//! The names of adapted parameters, PEFT's `target_parameters`.
//!
//! PEFT nests a wrapper for each adapted parameter around the module, the first of the module's parameters
//! innermost. A key tells the wrapper, `experts.base_layer.lora_A.weight`, and not the parameter.

use super::keys::{self, split};
use super::pairs::Pair;
use crate::layers::{ends_in, LayerKind, Part};
use crate::weights::{LayerWeights, LoraWeights};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// Renames the pairs of wrappers to their parameters' paths. `targets` lists the parameters of a module: in the module's
/// order, unless their names tell it.
pub(super) fn rename(
    targets: &[String],
    pairs: BTreeMap<String, Pair>,
) -> Result<BTreeMap<String, Pair>> {
    let mut modules = BTreeMap::<String, Vec<(usize, Pair)>>::new();
    for (path, pair) in pairs {
        let (module, outer) = keys::wrapped(&path);
        modules.entry(module.to_owned()).or_default().push((outer, pair));
    }
    let mut renamed = BTreeMap::new();
    for (module, mut wrappers) in modules {
        let names = parameters(targets, &module);
        wrappers.sort_by_key(|(outer, _)| *outer);
        let count = wrappers.len();
        if names.is_empty() && count == 1 {
            if let Some((0, pair)) = wrappers.pop() {
                renamed.insert(module, pair);
                continue;
            }
        }
        let nested = wrappers.iter().enumerate().all(|(i, (outer, _))| i == *outer);
        if names.len() != count || !nested {
            let reason = format!(
                "target_parameters has {names:?} for it, the file {count} pairs of lora_A and lora_B"
            );
            return Err(Error::tensor(module, reason));
        }
        let shapes: BTreeSet<_> = wrappers.iter().map(|(_, pair)| pair.sizes()).collect();
        // PEFT may write the list in any order.
        let (names, is_known) = in_known_order(names);
        if !is_known && shapes.len() < count {
            let reason = format!(
                "the factors of {names:?} have equal shapes, which do not tell whose they are: merge the adapter \
                 with PEFT"
            );
            return Err(Error::tensor(module, reason));
        }
        for (index, (name, (_, pair))) in names.iter().zip(wrappers.into_iter().rev()).enumerate() {
            renamed.insert(Part::Base(name).at(&module), Pair { parameter: Some(index), ..pair });
        }
    }
    Ok(renamed)
}

/// The parameters in the order that experts have them in, if their names tell: up before down.
fn in_known_order(mut names: Vec<&str>) -> (Vec<&str>, bool) {
    let place = |name: &str| match name {
        name if name.contains("down") => Some(1),
        name if name.contains("gate") || name.contains("up") => Some(0),
        _ => None,
    };
    let places: BTreeSet<_> = names.iter().filter_map(|name| place(name)).collect();
    let is_known = places.len() == names.len();
    if is_known {
        names.sort_by_key(|name| place(name));
    }
    (names, is_known)
}

/// The targets that are parameters of a module.
fn parameters<'a>(targets: &'a [String], module: &str) -> Vec<&'a str> {
    let mut names = vec![];
    for (of, name) in targets.iter().map(|target| split(target)) {
        if ends_in(module, of) && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The path in keys of each parameter, by its own.
pub(super) fn wrappers(weights: &LoraWeights) -> BTreeMap<&str, String> {
    let mut wrappers = BTreeMap::new();
    let mut modules = BTreeMap::<&str, usize>::new();
    for (path, module, _) in in_order(weights).into_iter().rev() {
        let outer = modules.entry(module).or_default();
        wrappers.insert(path, keys::wrapper(module, *outer));
        *outer += 1;
    }
    wrappers
}

/// The adapted parameters, those of a module in its order: PEFT's `target_parameters`.
pub(super) fn targets(weights: &LoraWeights) -> Vec<&str> {
    in_order(weights).into_iter().map(|(path, ..)| path).collect()
}

/// The adapted parameters with their modules and places, sorted by module and place.
fn in_order(weights: &LoraWeights) -> Vec<(&str, &str, usize)> {
    let parameter = |(path, layer): (_, &LayerWeights)| match layer.kind {
        Some(LayerKind::Parameter { index }) => Some((path, split(path).0, index)),
        _ => None,
    };
    let mut parameters: Vec<_> = weights.layers().filter_map(parameter).collect();
    parameters.sort_by_key(|(_, module, index)| (*module, *index));
    parameters
}
