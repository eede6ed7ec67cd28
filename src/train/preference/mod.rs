//! Losses that teach a model which of its answers people prefer. Names and defaults are those of TRL 1.16.

mod dpo;
mod grpo;
mod kto;
mod orpo;

pub use dpo::{dpo_loss, DpoConfig, DpoLossType};
pub use grpo::{
    group_advantages, grpo_loss, GrpoBatch, GrpoConfig, GrpoLossType, ImportanceSamplingLevel,
    ScaleRewards,
};
pub use kto::{kto_loss, KtoConfig, KtoLoss};
pub use orpo::orpo_loss;

use crate::ops::compute_dtype;
use candle_core::{bail, Result, Tensor, D};
use candle_nn::ops::log_softmax;

/// The log-probabilities of a chosen and a rejected answer for each of some prompts.
#[derive(Debug, Clone)]
pub struct PairLogProbs {
    /// (pairs)
    pub chosen: Tensor,
    /// (pairs)
    pub rejected: Tensor,
}

impl PairLogProbs {
    /// From those of a batch that has all chosen answers first, then all rejected ones in the same order.
    ///
    /// # Errors
    /// If `log_probs` is not a vector of an even length.
    pub fn split(log_probs: &Tensor) -> Result<Self> {
        let count = log_probs.dims1()?;
        if count % 2 > 0 {
            bail!(
                "{count} log-probabilities: expected as many of rejected answers as of chosen ones"
            )
        }
        let pairs = count / 2;
        Ok(Self {
            chosen: log_probs.narrow(0, 0, pairs)?,
            rejected: log_probs.narrow(0, pairs, pairs)?,
        })
    }

    /// Both in the dtype that losses are computed in, after a check of their shapes.
    fn checked(&self, name: &str) -> Result<(Tensor, Tensor)> {
        let Self { chosen, rejected } = self;
        if chosen.rank() != 1 || chosen.dims() != rejected.dims() || chosen.elem_count() == 0 {
            let (chosen, rejected) = (chosen.dims(), rejected.dims());
            bail!("{name}: chosen is {chosen:?} and rejected {rejected:?}, expected (pairs), at least one")
        }
        Ok((computed(chosen)?, computed(rejected)?))
    }
}

/// The loss of some pairs, and the rewards that it implies.
#[derive(Debug, Clone)]
pub struct PreferenceLoss {
    /// The mean over the pairs, a scalar.
    pub loss: Tensor,
    /// (pairs), without a graph.
    pub chosen_rewards: Tensor,
    /// (pairs), without a graph.
    pub rejected_rewards: Tensor,
}

/// `ln σ(x)`, by a softmax of two classes, which is exact at 0, where training begins, and far from it.
fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let classes = Tensor::stack(&[x, &x.zeros_like()?], D::Minus1)?;
    log_softmax(&classes, D::Minus1)?.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)
}

fn computed(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(compute_dtype(x.dtype()))
}

/// An error for an option that is not more than 0.
fn positive(name: &str, option: &str, value: f64) -> Result<()> {
    if !(value > 0. && value.is_finite()) {
        bail!("{name}: {option} is {value}, expected more than 0")
    }
    Ok(())
}
