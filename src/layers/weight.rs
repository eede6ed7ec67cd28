//! The unit of adaptation: a frozen weight and its bias, the update, the mode, and the merged copy.

use super::batch_update::BatchUpdate;
use super::binding::active::{active_update, active_variables, LayerId};
use super::binding::placeholder::Base;
use super::config::LoraConfig;
use super::mode::Mode;
use super::placement::Placement;
use super::token_rows::TokenRows;
use crate::ops::{self, compute_dtype, DropoutStream, LowRank, Matrix};
use candle_core::{bail, Result, Tensor};
use candle_nn::VarBuilder;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

/// A weight with a mode of its own, or with one that all layers of an adapter share.
#[derive(Debug, Clone)]
pub(crate) enum Weight {
    Own(WeightTensors, State),
    Shared(Arc<SharedWeight>),
}

/// A weight whose mode an adapter sets. Clones of a layer share it.
#[derive(Debug)]
pub(crate) struct SharedWeight {
    tensors: WeightTensors,
    state: RwLock<State>,
    layer: LayerId,
}

/// What a weight is made of. A layer gets it as a [`Weight`], when it is complete.
#[derive(Debug, Clone)]
pub(crate) struct WeightTensors {
    base: Base,
    bias: Option<Tensor>,
    update: Option<Update>,
    placement: Placement,
    merge_weights: bool,
}

/// What is trained beside a weight.
#[derive(Debug, Clone)]
enum Update {
    LowRank {
        factors: LowRank,
        /// Of B, (out).
        bias: Option<Tensor>,
    },
    Rows(TokenRows),
    /// A part of an update that other layers have, too.
    Shared(LowRank, View),
}

/// What a layer has of an update that it shares.
#[derive(Debug, Clone)]
pub(crate) enum View {
    /// All of it, transposed: a head that is tied to a table.
    Transposed,
    /// Some of its outputs: one of fused projections.
    Outputs(Range<usize>),
}

#[derive(Debug, Clone)]
pub(crate) enum State {
    Train,
    /// In evaluation, with the merged weight.
    Merged(MergedCopy),
    /// In evaluation, with the update beside the weight: the present values, or those of a snapshot.
    Unmerged {
        snapshot: Option<Arc<Snapshot>>,
    },
}

/// Detached copies of an update, of which a part is computed once, and of the bias.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    update: LowRank,
    bias: Option<Tensor>,
}

/// Detached copies of the merged weight and the bias.
#[derive(Debug, Clone)]
pub(crate) struct MergedCopy {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// The weight, the bias and the update of one forward.
pub(crate) struct Effective {
    pub weight: Matrix,
    pub bias: Option<Tensor>,
    /// The update that `weight` does not contain.
    pub update: BatchUpdate,
}

impl From<WeightTensors> for Weight {
    /// A weight with a mode of its own, in training.
    fn from(tensors: WeightTensors) -> Self {
        Self::Own(tensors, State::Train)
    }
}

impl Weight {
    /// A weight without an update.
    pub fn plain(base: Tensor, bias: Option<Tensor>, placement: Placement) -> Self {
        let base = Base::new(base);
        WeightTensors { base, bias, update: None, placement, merge_weights: true }.into()
    }

    fn tensors(&self) -> &WeightTensors {
        match self {
            Self::Own(tensors, _) => tensors,
            Self::Shared(shared) => &shared.tensors,
        }
    }

    fn with_state<R>(&self, f: impl FnOnce(&State) -> R) -> R {
        match self {
            Self::Own(_, state) => f(state),
            Self::Shared(shared) => f(&shared.state.read().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    pub fn base(&self) -> &Base {
        &self.tensors().base
    }

    pub fn bias(&self) -> Option<&Tensor> {
        self.tensors().bias.as_ref()
    }

    pub fn update(&self) -> Option<&LowRank> {
        self.tensors().low_rank()
    }

    pub fn mode(&self) -> Mode {
        self.with_state(|state| match state {
            State::Train => Mode::Train,
            State::Merged(_) | State::Unmerged { .. } => Mode::Eval,
        })
    }

    pub fn is_merged(&self) -> bool {
        self.with_state(|state| matches!(state, State::Merged(_)))
    }

    /// With the update of the adapters that are active on this thread, or else its own. In evaluation all tensors are detached, so that
    /// no graph is recorded.
    pub fn effective(&self) -> Result<Effective> {
        let tensors = self.tensors();
        let WeightTensors { base, bias, .. } = tensors;
        let active = match self {
            Self::Own(..) => None,
            Self::Shared(shared) => active_update(&shared.layer)?,
        };
        self.with_state(|state| {
            Ok(match (state, active) {
                (State::Train, None) => Effective {
                    weight: base.matrix()?,
                    bias: tensors.with_bias_of_b_added()?,
                    update: BatchUpdate::Whole(tensors.current()?).copied()?,
                },
                (State::Train, Some(active)) => Effective {
                    weight: base.matrix()?,
                    bias: bias.clone(),
                    update: active.copied()?,
                },
                (State::Merged(copy), None) => Effective {
                    weight: Matrix::Dense(copy.weight.clone()),
                    bias: copy.bias.clone(),
                    update: BatchUpdate::Whole(None),
                },
                (State::Unmerged { snapshot: Some(snapshot) }, None) => Effective {
                    weight: base.matrix()?.detach(),
                    bias: snapshot.bias.clone(),
                    update: BatchUpdate::Whole(Some(snapshot.update.clone())),
                },
                (State::Unmerged { snapshot: None }, None) => Effective {
                    weight: base.matrix()?.detach(),
                    bias: bias.as_ref().map(Tensor::detach),
                    update: BatchUpdate::Whole(None),
                },
                (State::Merged(_) | State::Unmerged { .. }, Some(active)) => Effective {
                    weight: base.matrix()?.detach(),
                    bias: bias.as_ref().map(Tensor::detach),
                    update: active,
                },
            })
        })
    }

    /// The tensors with a graph that a forward computes with: weight, bias, factors and magnitudes.
    pub fn tracked(&self) -> Vec<Tensor> {
        if self.mode() == Mode::Eval {
            return vec![];
        }
        let WeightTensors { base, bias, update, .. } = self.tensors();
        let active = match self {
            Self::Own(..) => None,
            Self::Shared(shared) => active_variables(&shared.layer),
        };
        let own = || update.iter().flat_map(Update::variables).cloned().collect();
        let mut tracked: Vec<_> = [base.tensor()]
            .into_iter()
            .chain(bias)
            .cloned()
            .chain(active.unwrap_or_else(own))
            .collect();
        tracked.retain(Tensor::track_op);
        tracked
    }

    /// See [`WeightTensors::merged_copy`].
    pub fn merged_copy(&self) -> Result<MergedCopy> {
        self.tensors().merged_copy()
    }

    /// See [`WeightTensors::merged`].
    pub fn merged(&self) -> Result<Tensor> {
        self.tensors().merged()
    }

    /// Sets the mode of this layer alone: a shared one is no longer followed.
    pub fn set_mode(&mut self, mode: Mode) -> Result<()> {
        let state = self.tensors().state(mode)?;
        *self = Self::Own(self.tensors().clone(), state);
        Ok(())
    }
}

impl SharedWeight {
    /// The base weight, or its placeholder.
    pub fn tensor(&self) -> &Tensor {
        self.tensors.base.tensor()
    }

    /// The state for a mode, to be set when all layers have one.
    pub fn prepare(&self, mode: Mode) -> Result<State> {
        self.tensors.state(mode)
    }

    pub fn set(&self, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

impl Update {
    fn variables(&self) -> Vec<&Tensor> {
        match self {
            Self::LowRank { factors, bias } => factors.variables().chain(bias).collect(),
            Self::Rows(rows) => vec![rows.trained()],
            Self::Shared(update, _) => update.variables().collect(),
        }
    }
}

impl WeightTensors {
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
            Some(_) => Base::new(base).detach(),
            None => Base::new(base),
        };
        let update = update.map(|factors| Update::LowRank { factors, bias: None });
        Ok(Self { base, bias: None, update, placement, merge_weights: cfg.merge_weights })
    }

    /// A linear layer's weight (out, in) with a part of an update that it shares.
    pub fn sharing(base: Tensor, update: LowRank, view: View, cfg: &LoraConfig) -> Self {
        let (base, update) = (Base::new(base).detach(), Some(Update::Shared(update, view)));
        let placement = Placement::AsIs;
        Self { base, bias: None, update, placement, merge_weights: cfg.merge_weights }
    }

    /// With the bias of B, if it has one.
    pub fn with_bias_of_b(mut self, of_b: Option<Tensor>) -> Self {
        if let Some(Update::LowRank { bias, .. }) = &mut self.update {
            *bias = of_b;
        }
        self
    }

    /// A table or head whose rows of these indices are `trainable_tokens` from `vb`.
    pub fn with_rows(
        base: Tensor,
        indices: &[usize],
        placement: Placement,
        cfg: &LoraConfig,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let base = Base::new(base).detach();
        let update = Some(Update::Rows(TokenRows::new(&base, indices, cfg, vb)?));
        Ok(Self { base, bias: None, update, placement, merge_weights: cfg.merge_weights })
    }

    pub fn with_bias(self, bias: Option<Tensor>) -> Self {
        Self { bias, ..self }
    }

    /// Draws the masks of the update's dropout from a stream.
    pub fn with_dropout_stream(self, stream: &Arc<DropoutStream>) -> Self {
        let update = self.update.map(|update| match update {
            Update::LowRank { factors, bias } => {
                Update::LowRank { factors: factors.with_dropout_stream(stream.clone()), bias }
            }
            rows => rows,
        });
        Self { update, ..self }
    }

    /// The weight of a layer whose clones share its mode, in training or evaluation from the start.
    pub fn shared(self, mode: Mode, layer: LayerId) -> Result<Arc<SharedWeight>> {
        let state = RwLock::new(self.state(mode)?);
        Ok(Arc::new(SharedWeight { tensors: self, state, layer }))
    }

    /// The factors, if there are some.
    pub fn low_rank(&self) -> Option<&LowRank> {
        match &self.update {
            Some(Update::LowRank { factors, .. }) => Some(factors),
            Some(Update::Rows(_) | Update::Shared(..)) | None => None,
        }
    }

    /// What a forward adds to the weight.
    fn current(&self) -> Result<Option<LowRank>> {
        match &self.update {
            Some(Update::Rows(rows)) => {
                rows.update(self.placement == Placement::Transposed).map(Some)
            }
            Some(Update::Shared(update, View::Transposed)) => {
                update.copied()?.transposed().map(Some)
            }
            Some(Update::Shared(update, View::Outputs(rows))) => {
                update.copied()?.outputs(rows.clone()).map(Some)
            }
            _ => Ok(self.low_rank().cloned()),
        }
    }

    /// The bias with that of B.
    fn with_bias_of_b_added(&self) -> Result<Option<Tensor>> {
        let Some(Update::LowRank { factors, bias: Some(of_b) }) = &self.update else {
            return Ok(self.bias.clone());
        };
        let of_b = if of_b.is_variable() { of_b.copy()? } else { of_b.clone() };
        let compute = compute_dtype(of_b.dtype());
        let scaled = (of_b.to_dtype(compute)? * factors.scaling())?;
        let sum = match &self.bias {
            Some(bias) => (bias.to_dtype(compute)? + scaled)?,
            None => scaled,
        };
        sum.to_dtype(self.base.tensor().dtype()).map(Some)
    }

    /// Merges for [`Mode::Eval`], unless `merge_weights` is off or the base is quantised: a merged copy would
    /// be several times its size.
    fn state(&self, mode: Mode) -> Result<State> {
        // A copy for some rows would be a second table.
        let is_matrix = !matches!(self.update, None | Some(Update::Rows(_)));
        let merges = self.merge_weights && is_matrix && self.base.blocks().is_none();
        Ok(match mode {
            Mode::Train => State::Train,
            Mode::Eval if merges => State::Merged(self.merged_copy()?),
            Mode::Eval => State::Unmerged { snapshot: self.snapshot()? },
        })
    }

    /// Of the update: what each forward would compute again is computed once, as DoRA's norms, and an optimizer that
    /// writes the variables meanwhile waits for no forward.
    fn snapshot(&self) -> Result<Option<Arc<Snapshot>>> {
        let Some(update) = self.current()? else { return Ok(None) };
        let snapshot = Snapshot { update: update.snapshot()?, bias: self.copied_bias()? };
        Ok(Some(Arc::new(snapshot)))
    }

    fn copied_bias(&self) -> Result<Option<Tensor>> {
        self.with_bias_of_b_added()?.map(|bias| Ok(bias.copy()?.detach())).transpose()
    }

    /// Copies, which later changes of the variables do not reach.
    fn merged_copy(&self) -> Result<MergedCopy> {
        Ok(MergedCopy { weight: self.merged()?, bias: self.copied_bias()? })
    }

    /// The merged weight in W's layout, without a graph. The base is never written.
    pub fn merged(&self) -> Result<Tensor> {
        let base = self.base.dense()?;
        if let Some(Update::Rows(rows)) = &self.update {
            return rows.merged(&base);
        }
        let Some(update) = self.current()? else {
            return Ok(if base.is_variable() { base.copy()?.detach() } else { base.detach() });
        };
        let matrix = match self.placement {
            Placement::AsIs | Placement::Transposed => base.dims2()?,
            Placement::Reshaped => (update.b().dim(0)?, update.a().dim(1)?),
        };
        let transposed = self.placement == Placement::Transposed;
        let magnitude = update.magnitude().map(|own| (own, self.placement.output_dim()));
        ops::merge(&base, matrix, update.terms(base.dtype(), matrix, transposed)?, magnitude)
    }
}
