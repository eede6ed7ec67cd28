//! Which tensors of a base an adapter changes, and how.

use super::change::Change;
use super::experts::set_orientations;
use crate::layers::{without_conv, LoraConfig, Part};
use crate::weights::{flattened_hint, has_other_head, head_weight, is_tied, table_of, LoraWeights};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};

/// The changes by tensor of the base, in the order in which they are applied.
pub(crate) struct Plan {
    changes: BTreeMap<String, Vec<Change>>,
    /// Heads that the base ties to a table, and that have to be tensors of their own, with the tables.
    untied: BTreeMap<String, String>,
    /// Tensors of the adapter that the base has not.
    added: BTreeMap<String, Tensor>,
    options: LoraConfig,
}

/// Which tensors that the base lacks an adapter may have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Additions {
    None,
    /// Those of modules that it trains whole, such as a new head.
    Modules,
    All,
}

impl Plan {
    /// The changes of a base that has the tensors for which `exists` is true; `dims` gives their shapes.
    pub fn new(
        weights: &LoraWeights,
        exists: impl Fn(&str) -> bool,
        dims: impl Fn(&str) -> Option<Vec<usize>>,
        additions: Additions,
    ) -> Result<Self> {
        let mut weights = weights.joined()?.with_experts_of(&exists, &dims)?;
        set_orientations(&mut weights, dims);
        let mut changes = BTreeMap::<String, Vec<Change>>::new();
        let (mut untied, mut tied, mut added) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        let may_add = |name: &str| match additions {
            Additions::None => false,
            // A module that the base has at a shorter path is of another model.
            Additions::Modules => weights.trains_module(name) && !has_end_of(name, &exists),
            Additions::All => true,
        };
        let weight = |path: &str| Part::Base("weight").at(path);
        for (name, tensor) in &weights.others {
            let (path, part) = Part::parse(name);
            let is_weight = part == Part::Base("weight");
            let table = || table_of(path, &exists).filter(|_| is_weight);
            let name = match exists(name) {
                true => name.clone(),
                false if is_weight && is_tied(path, &weights, &exists)? => {
                    tied.insert(name.clone());
                    continue;
                }
                false if table().is_some() => {
                    untied.extend(table().map(|table| (name.clone(), weight(&table))));
                    name.clone()
                }
                false => match find(without_conv(path).unwrap_or(path), part.name(), &exists) {
                    Err(_) if may_add(name) => {
                        added.insert(name.clone(), tensor.clone());
                        name.clone()
                    }
                    found => found?,
                },
            };
            changes.entry(name).or_default().push(Change::Replace(tensor.clone()));
        }
        // A head that the adapter adds may have an update, too.
        let own: BTreeSet<_> = changes.keys().cloned().collect();
        let of_base = &exists;
        let exists = |name: &str| of_base(name) || own.contains(name);
        for (path, layer) in weights.layers() {
            let weight = match layer.is_parameter() {
                true if exists(path) => path.to_owned(),
                true => return Err(missing(path)),
                false if exists(&weight(path)) => weight(path),
                false if is_tied(path, &weights, exists)? => {
                    tied.insert(weight(path));
                    continue;
                }
                false => match table_of(path, exists) {
                    Some(table) => {
                        untied.insert(weight(path), weight(&table));
                        weight(path)
                    }
                    None => find(path, "weight", exists)?,
                },
            };
            // PEFT also saves the table under an embedding's adapter. In a state dict of a whole model
            // it may be merged already.
            if changes.contains_key(&weight) && layer.kind.is_none() {
                let reason = "the adapter has both the tensor and an update of it";
                return Err(Error::tensor(weight, reason));
            }
            changes.entry(weight).or_default().push(Change::Update(layer.clone()));
            if let Some(bias) = &layer.bias {
                let scaling = layer.options(&weights.options.lora).scaling();
                let change = Change::AddBias { bias: bias.clone(), scaling };
                changes.entry(find(path, "bias", exists)?).or_default().push(change);
            }
        }
        for (path, rows) in &weights.token_rows {
            changes
                .entry(find(path, "weight", exists)?)
                .or_default()
                .push(Change::Rows(rows.clone()));
        }
        if !(has_other_head(&weights) || weights.options.ensure_weight_tying) {
            let heads = changes
                .keys()
                .filter_map(|table| Some((head_weight(table, of_base)?, table.clone())));
            let is_apart = |head: &String| !(of_base(head) || tied.contains(head));
            let heads: Vec<_> = heads.filter(|(head, _)| is_apart(head)).collect();
            for (head, table) in heads {
                let of_both =
                    |change: &&Change| change.is_of_tied(|| weights.trains_module(&table));
                let all = &changes[&table];
                let mut common: Vec<_> = all.iter().filter(of_both).cloned().collect();
                let own = changes.get(&head).cloned().unwrap_or_default();
                if common.len() < all.len() || !own.is_empty() {
                    // Before those of the head alone.
                    common.extend(own);
                    if !common.is_empty() {
                        changes.insert(head.clone(), common);
                    }
                    untied.insert(head, table);
                }
            }
        }
        Ok(Self { changes, untied, added, options: weights.options.lora })
    }

    /// The tensor that replaces this one of the base, or `None` if it is unchanged.
    pub fn apply(&self, name: &str, base: &Tensor) -> Result<Option<Tensor>> {
        let Some(changes) = self.changes.get(name) else { return Ok(None) };
        let apply = |tensor: Tensor, change: &Change| change.apply(&tensor, &self.options);
        let changed = changes.iter().try_fold(base.clone(), apply);
        changed.map(Some).map_err(|e| Error::tensor(name, e))
    }

    /// The tensors of the base that change, and the heads that become tensors.
    pub fn changed(&self) -> BTreeSet<&str> {
        self.changes.keys().chain(self.untied.keys()).map(String::as_str).collect()
    }

    /// The tensors of the base whose values are used.
    pub fn of_base(&self) -> impl Iterator<Item = &str> {
        let changed = self.changes.keys().filter(|name| !self.added.contains_key(*name));
        changed.chain(self.untied.values()).map(String::as_str)
    }

    /// The tensors that the base has not, with their changes.
    pub fn added(&self) -> Result<BTreeMap<&str, Tensor>> {
        let merged = |(name, tensor): (&String, &Tensor)| self.apply(name, tensor);
        let changed =
            self.added.iter().map(|of| Ok((of.0.as_str(), merged(of)?.unwrap_or(of.1.clone()))));
        changed.collect()
    }

    /// The heads that the base ties to a table, and that have to be tensors of their own, with the table whose values
    /// they have before their [changes](Self::apply).
    pub fn untied(&self) -> impl Iterator<Item = (&str, &str)> {
        self.untied.iter().map(|(head, table)| (head.as_str(), table.as_str()))
    }

    /// The heads that the base has beside tables that change, with the tables.
    pub fn heads_beside(&self, exists: impl Fn(&str) -> bool) -> Vec<(String, String)> {
        let heads = self.changes.keys().filter_map(|table| {
            let head = head_weight(table, &exists)?;
            exists(&head).then(|| (head, table.clone()))
        });
        heads.collect()
    }

    /// The table of such a head.
    pub fn table(&self, head: &str) -> Option<&str> {
        self.untied.get(head).map(String::as_str)
    }

    pub fn changes(&self, name: &str) -> bool {
        self.changes.contains_key(name)
    }
}

/// Whether one of these is at the end of the name.
fn has_end_of(name: &str, exists: impl Fn(&str) -> bool) -> bool {
    name.match_indices('.').any(|(at, _)| exists(&name[at + 1..]))
}

/// The tensor of a layer, which a convolution may have by loralib's second name.
fn find(path: &str, last: &str, exists: impl Fn(&str) -> bool) -> Result<String> {
    let names = [Part::Base(last).at(path), format!("{}.{last}", Part::Base("conv").at(path))];
    let found = names.into_iter().find(|name| exists(name));
    found.ok_or_else(|| missing(&Part::Base(last).at(path)))
}

fn missing(name: &str) -> Error {
    let wrapped = name.split('.').any(|component| component == "_orig_mod").then_some(
        "_orig_mod is of a model that torch.compile wrapped, rename the tensors without it",
    );
    let hint = wrapped.or(flattened_hint(Part::parse(name).0));
    let hint = hint.map_or_else(String::new, |hint| format!(": {hint}"));
    Error::tensor(name, format!("the adapter changes it, but the base does not have it{hint}"))
}
