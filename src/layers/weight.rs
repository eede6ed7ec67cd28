//! The unit of adaptation: a frozen weight, its update, the mode, and the merged copy.

use super::{LoraConfig, LowRank, Mode};
use crate::ops;
use candle_core::{bail, Result, Tensor};

/// How `B·A` lies in the stored weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// As it is: (out, in).
    AsIs,
    /// Transposed: (in, out), or an embedding's (num, dim).
    Transposed,
    /// Reshaped to a convolution's kernel.
    Reshaped,
}

#[derive(Debug, Clone)]
pub(crate) struct Weight {
    base: Tensor,
    update: Option<LowRank>,
    placement: Placement,
    merge_weights: bool,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    Train,
    Eval { merged: Option<Tensor> },
}

impl Weight {
    pub fn new(
        base: Tensor,
        update: Option<LowRank>,
        placement: Placement,
        cfg: &LoraConfig,
    ) -> Result<Self> {
        // An adapted base is frozen, whoever holds it as a variable.
        let base = match &update {
            Some(update) if !update.a().device().same_device(base.device()) => bail!(
                "the base weight is on {:?} and its adapter on {:?}",
                base.device().location(),
                update.a().device().location()
            ),
            Some(_) => base.detach(),
            None => base,
        };
        Ok(Self { base, update, placement, merge_weights: cfg.merge_weights, state: State::Train })
    }

    pub fn base(&self) -> &Tensor {
        &self.base
    }

    pub fn update(&self) -> Option<&LowRank> {
        self.update.as_ref()
    }

    pub fn is_merged(&self) -> bool {
        matches!(self.state, State::Eval { merged: Some(_) })
    }

    /// What to run with: the weight, and the update still to add.
    pub fn running(&self) -> (Tensor, Option<LowRank>) {
        match &self.state {
            State::Train => (self.base.clone(), self.update.clone()),
            State::Eval { merged: Some(merged) } => (merged.clone(), None),
            State::Eval { merged: None } => {
                (self.base.detach(), self.update.as_ref().map(LowRank::frozen))
            }
        }
    }

    /// `bias` as the mode wants it: evaluation records no graph.
    pub fn running_bias(&self, bias: Option<&Tensor>) -> Option<Tensor> {
        match self.state {
            State::Train => bias.cloned(),
            State::Eval { .. } => bias.map(Tensor::detach),
        }
    }

    /// `W + ΔW` as W is stored, without a graph. The base is never written.
    pub fn merged(&self) -> Result<Tensor> {
        let Some(update) = &self.update else { return Ok(self.base.detach()) };
        let matrix = match self.placement {
            Placement::AsIs | Placement::Transposed => self.base.dims2()?,
            Placement::Reshaped => (update.b().dim(0)?, update.a().dim(1)?),
        };
        let transposed = self.placement == Placement::Transposed;
        let terms = update.terms(self.base.dtype(), matrix, transposed)?;
        ops::merge(&self.base, matrix, terms)
    }

    pub fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.state = match mode {
            Mode::Train => State::Train,
            Mode::Eval if self.merge_weights && self.update.is_some() => {
                State::Eval { merged: Some(self.merged()?) }
            }
            Mode::Eval => State::Eval { merged: None },
        };
        Ok(())
    }
}
