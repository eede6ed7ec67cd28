//! The adapters of a forward, chosen by name.

use super::{Adapters, Added, WeightedAdapters};
use crate::adapter::Choice;
use crate::layers::binding::active::{Activations, Active, ActiveAdapter};
use crate::layers::Mode;
use crate::ops::LowRank;
use crate::{Error, Result};

impl Adapters {
    /// An adapter, `"sql"`, or the weighted sum of some, `[("sql", 0.7), ("chat", 0.3)]`: `W + 0.7·ΔW₁ + 0.3·ΔW₂`.
    ///
    /// # Errors
    /// If there is no adapter of a name, or none is named, or one twice; if a weight is not finite; and if an adapter
    /// of a sum trains with dropout, or has `use_dora`, which a sum does not have.
    pub fn choice(&self, adapters: impl Into<WeightedAdapters>) -> Result<Choice> {
        self.weighted(&adapters.into()).map(|active| self.chosen(active))
    }

    /// The base.
    pub fn choice_none(&self) -> Choice {
        self.chosen(Active::Sum(vec![]))
    }

    /// For each row of a batch its own adapter or, with `None`, the base: the inputs of the adapted layers are
    /// (rows, ..). A linear layer multiplies the batch by its base once.
    ///
    /// # Errors
    /// If there is no adapter of a name, or no row; if an adapter [trains](Self::add), since the factors get no
    /// gradient here, or has `use_dora`. And in an adapted layer, if its input has another number of rows, or an
    /// embedding's ids are (rows), which positions are too. That the first dimension is the batch is not known: a model
    /// whose layers get, say, (tokens, rows, ..) with as many tokens as rows computes with the wrong adapters.
    pub fn choice_rows(&self, rows: &[Option<&str>]) -> Result<Choice> {
        self.rows(rows).map(|active| self.chosen(active))
    }

    /// Makes a forward on a thread without a choice an error, in place of the base: for servers, in which it is a
    /// mistake. `with_none` is a choice.
    pub fn require_choice(&self, required: bool) {
        self.record.scope.require_active(required);
    }

    fn chosen(&self, active: Active) -> Choice {
        Choice(Activations::of(&self.record.scope, active))
    }

    fn weighted(&self, weights: &WeightedAdapters) -> Result<Active> {
        let adapters = self.named(weights)?;
        let alone = matches!(adapters[..], [(.., 1.)]);
        let active = adapters.into_iter().map(|(name, added, weight)| {
            if !alone {
                added.refuse_dora(name)?;
            }
            let active = added.active(weight);
            let dropped = |update: &LowRank| update.dropout().p > 0.;
            if !alone && active.mode == Mode::Train && active.updates.values().any(dropped) {
                let reason = "has no dropout: set `lora_dropout` to 0, or call `eval()`";
                return Err(Error::Invalid(format!(
                    "the adapter {name:?} trains with dropout, but a weighted sum {reason}"
                )));
            }
            Ok(active)
        });
        Ok(Active::Sum(active.collect::<Result<_>>()?))
    }

    fn rows(&self, rows: &[Option<&str>]) -> Result<Active> {
        if rows.is_empty() {
            return Err(Error::Invalid("the batch has no rows".to_owned()));
        }
        let active = |group: &[Option<&str>]| {
            let Some(name) = group[0] else { return Ok((group.len(), None)) };
            let added = self.one(name)?;
            added.refuse_dora(name)?;
            let adapter = added.active(1.);
            if adapter.mode == Mode::Train {
                let reason = "call `eval()`, or choose it for a whole batch by `with`";
                return Err(Error::Invalid(format!(
                    "the adapter {name:?} trains, but rows have no gradient: {reason}"
                )));
            }
            Ok((group.len(), Some(adapter)))
        };
        Ok(Active::Rows(rows.chunk_by(|a, b| a == b).map(active).collect::<Result<_>>()?))
    }
}

impl Added {
    /// An error if a layer has a magnitude: it scales the base's output too.
    pub(super) fn refuse_dora(&self, name: &str) -> Result<()> {
        match self.updates.values().any(|update| update.magnitude().is_some()) {
            false => Ok(()),
            true => Err(Error::unsupported(
                format!("the adapter {name:?} with use_dora in a weighted sum or by rows"),
                "its magnitudes scale the base's output too: choose it alone by `with`, at the weight 1",
            )),
        }
    }

    fn active(&self, weight: f64) -> ActiveAdapter {
        let mode = self.adapter.state().mode_among_others(self.adapter.options.loaded);
        let scope = self.adapter.record.scope.clone();
        ActiveAdapter { scope, updates: self.updates.clone(), weight, mode }
    }
}
