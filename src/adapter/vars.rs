//! What an adapter trains: its variables, their gradients, and the position of its dropout.

use super::check::excluded;
use super::Adapter;
use crate::layers::Part;
use crate::utils::{is_statistic, is_untrained, require_grads, variables, Trainable};
use crate::weights::parameter_of;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::Var;
use candle_nn::VarMap;
use std::collections::BTreeMap;

impl Adapter {
    /// The variables to train, sorted by name, for an optimizer.
    ///
    /// # Errors
    /// If there are none.
    pub fn vars(&self) -> Result<Vec<Var>> {
        Ok(self.named_vars()?.into_values().collect())
    }

    /// [`vars`](Self::vars) with their names, for [`train::AdamW`](crate::train::AdamW).
    ///
    /// # Errors
    /// If there are none.
    pub fn named_vars(&self) -> Result<BTreeMap<String, Var>> {
        let trained = Trainable::from(&self.options.config).trained(&self.vars);
        // The file of an adapter without what its options promise could not be read.
        let failures = self.state().adapted.failures.clone();
        let promised = |path: &String| {
            parameter_of(path).is_some_and(|own| self.options.trains_parameter(&own))
                || self.options.token_rows(path).is_some()
        };
        if let Some((path, reason)) = failures.iter().find(|(path, _)| promised(path)) {
            return Err(Error::tensor(Part::Base("weight").at(path), reason));
        }
        let without_targets = self.options.targets.is_none() && self.options.parameters.is_empty();
        trained.map_err(|error| match error {
            Error::Empty { .. } if without_targets => {
                let reason = "nothing to train: the adapter has no targets, such as `targets(\"all-linear\")`";
                Error::Invalid(reason.to_owned())
            }
            // Why there are none, where that is known.
            error @ Error::Empty { .. } => {
                self.check_models().err().unwrap_or_else(|| self.all_excluded().unwrap_or(error))
            }
            error => error,
        })
    }

    /// The reason that nothing is trained, if every target is excluded.
    fn all_excluded(&self) -> Option<Error> {
        let excluded = excluded(&self.options, &self.record);
        let first = excluded.first().filter(|_| self.state().adapted.layers.is_empty())?;
        Some(Error::Invalid(format!(
            "nothing to train: `exclude` leaves out every layer that the targets match, such as {first:?}"
        )))
    }

    /// The variables that are saved and that no optimizer trains, by name: the running statistics of batch norms that
    /// are trained as a whole, and the initial factors of [`InitLoraWeights`](crate::layers::InitLoraWeights). A run is
    /// resumed to the bit if [`train::AdamW::with_frozen`](crate::train::AdamW::with_frozen) has them. Mostly none.
    pub fn frozen_vars(&self) -> BTreeMap<String, Var> {
        variables(&self.vars).into_iter().filter(|(name, _)| is_untrained(name)).collect()
    }

    /// The running statistics of its batch norms.
    pub(super) fn statistics(&self) -> Vec<Var> {
        let all = variables(&self.vars).into_iter();
        all.filter(|(name, _)| is_statistic(name)).map(|(_, var)| var).collect()
    }

    /// All variables of the adapter by name, for functions that take a `VarMap`, such as
    /// [`missing_grads`](crate::missing_grads).
    pub fn var_map(&self) -> &VarMap {
        &self.vars
    }

    /// An error unless every variable has a gradient in `grads`: call it after the first backward. Some operations of
    /// candle cut the graph without an error; see [`missing_grads`](crate::missing_grads).
    ///
    /// # Errors
    /// With the names of the variables without a gradient; and if nothing is trained.
    pub fn require_grads(&self, grads: &GradStore) -> Result<()> {
        require_grads(&self.named_vars()?, grads)
    }

    /// How many masks dropout has drawn from the [`seed`](Self::seed), 0 without one: with the variables and the
    /// optimizer's state, what a run needs to be resumed to the bit.
    pub fn dropout_position(&self) -> u64 {
        self.options.dropout.as_ref().map_or(0, |stream| stream.position())
    }

    /// Continues dropout at a [`dropout_position`](Self::dropout_position).
    ///
    /// # Errors
    /// If the adapter has no [`seed`](Self::seed), unless the position is 0.
    pub fn set_dropout_position(&self, position: u64) -> Result<()> {
        match &self.options.dropout {
            Some(stream) => stream.seek(position),
            None if position > 0 => {
                let reason = format!("dropout at position {position} needs the adapter's seed");
                return Err(Error::Invalid(reason));
            }
            None => {}
        }
        Ok(())
    }
}
