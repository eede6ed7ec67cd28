//! Preference optimization without a reference.

use super::pairs::{PairLogProbs, PreferenceLoss};
use super::scores::{log_sigmoid, positive};
use candle_core::{bail, Result, Tensor};

/// The loss of ORPO (arXiv 2403.07691), which needs no reference: `nll - beta · mean(ln σ(log_odds))`, with
/// `log_odds = ln(p/(1 - p))` of the chosen answer less that of the rejected one.
///
/// `log_probs` are means over an answer's tokens, so that `p` is the geometric mean of their probabilities. `nll` is the
/// cross-entropy of prompts and chosen answers, a scalar. TRL's default of `beta` is 0.1. The rewards are
/// `beta · log_probs`.
///
/// # Errors
/// If `log_probs` are not two vectors of the same length, or are empty, `nll` is no scalar, or `beta` is not positive.
pub fn orpo_loss(log_probs: &PairLogProbs, nll: &Tensor, beta: f64) -> Result<PreferenceLoss> {
    const NAME: &str = "orpo_loss";
    positive(NAME, "beta", beta)?;
    if nll.rank() > 0 {
        bail!("{NAME}: nll is {:?}, expected a scalar", nll.dims())
    }
    let (chosen, rejected) = log_probs.checked(NAME)?;
    let log_odds = ((&chosen - &rejected)? - (log_1m_exp(&chosen)? - log_1m_exp(&rejected)?)?)?;
    let preference = log_sigmoid(&log_odds)?.mean_all()?;
    Ok(PreferenceLoss {
        loss: (nll.to_dtype(preference.dtype())? - (preference * beta)?)?,
        chosen_rewards: (chosen.detach() * beta)?,
        rejected_rewards: (rejected.detach() * beta)?,
    })
}

/// `ln(1 - eˣ)` of x < 0, by `1 - eˣ = tanh(-x/2)·(1 + eˣ)`, which is exact near 0 as well.
fn log_1m_exp(x: &Tensor) -> Result<Tensor> {
    (x * -0.5)?.tanh()?.log()? + (x.exp()? + 1.)?.log()?
}
