//! A head and the table of embeddings that the adapter trains as one tensor, because the model ties them.
//!
//! PEFT's model with a trained table alone has a head of the base's values. So a file of an adapter has the head too,
//! with the table's values, as PEFT's `ensure_weight_tying` writes it.

use super::options::Options;
use super::record::Record;
use super::state::Adapted;
use super::Adapter;
use crate::layers::{is_within, LayerKind, Part};
use crate::utils::variables;
use crate::weights::{head_of, head_weight, LoraWeights};
use crate::{Error, Result};
use candle_nn::VarMap;
use std::collections::{BTreeMap, BTreeSet};

impl Adapter {
    /// The weights of heads that are trained as one tensor with a table, and the tables.
    pub(super) fn tied(&self) -> BTreeMap<String, String> {
        let mut tied = self.options.tied.clone();
        tied.extend(tied_in_models(&self.vars, &self.record));
        let weight = |path: &String| Part::Base("weight").at(path);
        let updates = self.state().adapted.tied.clone().into_iter();
        tied.extend(updates.map(|(head, table)| (weight(&head), weight(&table))));
        tied
    }
}

/// The heads that models tie to a table which the adapter trains as a whole.
fn tied_in_models(vars: &VarMap, record: &Record) -> BTreeMap<String, String> {
    let vars = variables(vars);
    let tied = record.tied().into_iter().filter_map(|(path, kinds)| {
        let table = Part::Base("weight").at(&path);
        let head = head_weight(&table, |name| record.has(name))?;
        let is_table = [LayerKind::Embedding, LayerKind::Linear].iter().all(|k| kinds.contains(k));
        let one = is_table && vars.contains_key(&table);
        (one && !vars.contains_key(&head) && !record.has(&head)).then_some((head, table))
    });
    tied.collect()
}

/// An error if the adapter is loaded with a table alone, and a model ties a head to it: the head is the base's table in
/// PEFT's model, and the adapter's here. Also if the adapter's `ensure_weight_tying` makes a head follow the update of a
/// table, since a layer of a model on `var_builder` has its own update alone.
pub(super) fn check_tied(
    options: &Options,
    vars: &VarMap,
    adapted: &Adapted,
    record: &Record,
) -> Result<()> {
    let follows = options.config.ensure_weight_tying;
    let tied: BTreeSet<_> = record.tied().into_iter().map(|(path, _)| path).collect();
    let has_head = |path: &&String| {
        let of_own_name = record.has_head_of(&Part::Base("weight").at(path));
        let is_tied = tied.contains(*path) || (of_own_name && !has_factors_of_head(path, adapted));
        is_tied && !adapted.tied.values().any(|table| table == *path)
    };
    if let Some(path) = adapted.layers.keys().filter(|_| follows).find(has_head) {
        let reason = "with ensure_weight_tying the model's head, which is tied to it, has the update too: build the model \
                      on the adapter's own `var_builder` or on `Adapter::merged`";
        return Err(Error::tensor(Part::A.at(path), reason));
    }
    let mut tied = tied_in_models(vars, record).into_iter();
    let alone = |head: &String| !(follows || options.tied.contains_key(head));
    match tied.find(|(head, _)| options.loaded && alone(head)) {
        None => Ok(()),
        Some((head, table)) => {
            let reason = format!(
                "the adapter trains it alone, and the model ties its head to it: in PEFT's model the head keeps the \
                 base's values: build the model with `tie_word_embeddings: false`, for which {head:?} is there too"
            );
            Err(Error::tensor(table, reason))
        }
    }
}

/// Whether the head of a table is a layer of the adapter, too.
fn has_factors_of_head(table: &str, adapted: &Adapted) -> bool {
    head_of(table, |_| false).is_some_and(|head| adapted.layers.contains_key(&head))
}

/// Takes the heads that are trained as one tensor with a table out of an adapter: the weights' names, and the tables'.
pub(super) fn take_tied(weights: &mut LoraWeights) -> Result<BTreeMap<String, String>> {
    let mut tied = BTreeMap::new();
    for (head, table) in weights.tied_updates()? {
        weights.layers.remove(Part::parse(&head).0);
        tied.insert(head, table);
    }
    for (head, table) in weights.tied_modules()? {
        weights.others.remove(&head);
        let others = &weights.others;
        let holds = |module: &String| others.keys().any(|name| is_within(name, module));
        weights.options.modules_to_save.retain(holds);
        tied.insert(head, table);
    }
    Ok(tied)
}

/// Adds them again.
pub(super) fn add_tied(weights: &mut LoraWeights, tied: BTreeMap<String, String>) -> Result<()> {
    for (head, table) in tied {
        let (head_path, table_path) = (Part::parse(&head).0, Part::parse(&table).0);
        let update = weights.layers.get(table_path);
        if let Some(layer) = update.filter(|_| !weights.layers.contains_key(head_path)) {
            let transposed = layer.transposed(LayerKind::Linear)?;
            weights.layers.insert(head_path.to_owned(), transposed);
            weights.options.ensure_weight_tying = true;
            continue;
        }
        let Some(tensor) = weights.others.get(&table).cloned() else { continue };
        weights.options.ensure_weight_tying = true;
        weights.options.modules_to_save.push(Part::parse(&head).0.to_owned());
        weights.others.insert(head, tensor);
    }
    Ok(())
}
