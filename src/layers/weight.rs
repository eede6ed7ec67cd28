//! The unit of adaptation: a frozen weight and its bias, the update, the mode, and the merged copy.

use super::config::LoraConfig;
use super::mode::Mode;
use crate::ops::{self, LowRank};
use candle_core::{bail, Result, Tensor};

/// How `B·A` is stored in the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Unchanged: (out, in).
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
    Eval { merged: Option<MergedCopy> },
}

/// Detached copies of the merged weight and the bias.
#[derive(Debug, Clone)]
pub(crate) struct MergedCopy {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// The weight, the bias and the update of one forward.
pub(crate) struct Effective {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    /// The update that `weight` does not contain.
    pub update: Option<LowRank>,
}

impl Weight {
    pub fn new(
        base: Tensor,
        update: Option<LowRank>,
        placement: Placement,
        cfg: &LoraConfig,
    ) -> Result<Self> {
        // An adapted base is frozen, even if the caller holds it as a variable.
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

    pub fn mode(&self) -> Mode {
        match self.state {
            State::Train => Mode::Train,
            State::Eval { .. } => Mode::Eval,
        }
    }

    pub fn is_merged(&self) -> bool {
        matches!(self.state, State::Eval { merged: Some(_) })
    }

    /// In evaluation all tensors are detached, so that no graph is recorded.
    pub fn effective(&self) -> Effective {
        let (weight, bias, update) = match &self.state {
            State::Train => (self.base.clone(), self.bias.clone(), self.update.clone()),
            State::Eval { merged: Some(copy) } => (copy.weight.clone(), copy.bias.clone(), None),
            State::Eval { merged: None } => (
                self.base.detach(),
                self.bias.as_ref().map(Tensor::detach),
                self.update.as_ref().map(LowRank::detached),
            ),
        };
        Effective { weight, bias, update }
    }

    /// Copies, which later changes of the variables do not reach.
    pub fn merged_copy(&self) -> Result<MergedCopy> {
        let bias = self.bias.as_ref().map(Tensor::copy).transpose()?;
        Ok(MergedCopy { weight: self.merged()?, bias: bias.map(|bias| bias.detach()) })
    }

    /// `W + ΔW` in W's layout, without a graph. The base is never written.
    pub fn merged(&self) -> Result<Tensor> {
        let Some(update) = &self.update else {
            let base = if self.base.is_variable() { self.base.copy()? } else { self.base.clone() };
            return Ok(base.detach());
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
                State::Eval { merged: Some(self.merged_copy()?) }
            }
            Mode::Eval => State::Eval { merged: None },
        };
        Ok(())
    }
}
