//! Pairs of answers, and what a loss says of them.

use super::scores::computed;
use candle_core::{bail, Result, Tensor};

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
        let &[count] = log_probs.dims() else {
            bail!(
                "PairLogProbs: the log-probabilities are {:?}, expected one for each answer: sum those of its tokens",
                log_probs.dims()
            )
        };
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
    pub(super) fn checked(&self, name: &str) -> Result<(Tensor, Tensor)> {
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
