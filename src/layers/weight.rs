//! The unit of adaptation: a frozen weight and its bias, the update, the mode, and the merged copy.

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
    bias: Option<Tensor>,
    update: Option<LowRank>,
    placement: Placement,
    merge_weights: bool,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    Train,
    Eval { merged: Option<Plain> },
}

/// A weight and a bias that nobody else can change.
#[derive(Debug, Clone)]
pub(crate) struct Plain {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// What a forward runs with.
pub(crate) struct Running {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    /// What is still to add to the weight.
    pub update: Option<LowRank>,
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
        let (merge_weights, state) = (cfg.merge_weights, State::Train);
        Ok(Self { base, bias: None, update, placement, merge_weights, state })
    }

    pub fn with_bias(self, bias: Option<Tensor>) -> Self {
        Self { bias, ..self }
    }

    pub fn base(&self) -> &Tensor {
        &self.base
    }

    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    pub fn update(&self) -> Option<&LowRank> {
        self.update.as_ref()
    }

    pub fn is_merged(&self) -> bool {
        matches!(self.state, State::Eval { merged: Some(_) })
    }

    /// Evaluation runs on detached tensors: it records no graph.
    pub fn running(&self) -> Running {
        let (weight, bias, update) = match &self.state {
            State::Train => (self.base.clone(), self.bias.clone(), self.update.clone()),
            State::Eval { merged: Some(plain) } => (plain.weight.clone(), plain.bias.clone(), None),
            State::Eval { merged: None } => (
                self.base.detach(),
                self.bias.as_ref().map(Tensor::detach),
                self.update.as_ref().map(LowRank::frozen),
            ),
        };
        Running { weight, bias, update }
    }

    /// The merged weight and a copy of the bias: a later change of the variables is not theirs.
    pub fn plain(&self) -> Result<Plain> {
        let bias = self.bias.as_ref().map(Tensor::copy).transpose()?;
        Ok(Plain { weight: self.merged()?, bias: bias.map(|bias| bias.detach()) })
    }

    /// `W + ΔW` as W is stored, without a graph. The base is never written.
    pub fn merged(&self) -> Result<Tensor> {
        let Some(update) = &self.update else {
            return match self.base.is_variable() {
                true => Ok(self.base.copy()?.detach()),
                false => Ok(self.base.detach()),
            };
        };
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
                State::Eval { merged: Some(self.plain()?) }
            }
            Mode::Eval => State::Eval { merged: None },
        };
        Ok(())
    }
}
