//! Direct preference optimization.

use super::pairs::{PairLogProbs, PreferenceLoss};
use super::scores::{log_sigmoid, positive};
use candle_core::{bail, Result};

/// Which function of the margin [`dpo_loss`] is, with `z = beta · margin`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DpoLossType {
    /// `-ln σ(z)`, of the DPO paper (arXiv 2305.18290). With [`label_smoothing`](DpoConfig::label_smoothing) ε its
    /// conservative form, `-(1 - ε) ln σ(z) - ε ln σ(-z)`.
    #[default]
    Sigmoid,
    /// `max(0, 1 - z)`, of SLiC (arXiv 2305.10425).
    Hinge,
    /// `(margin - 1/(2·beta))²`, of IPO (arXiv 2310.12036). The log-probabilities are means over an answer's tokens, as
    /// TRL takes them, not sums.
    Ipo,
    /// `(-(1 - ε) ln σ(z) + ε ln σ(-z)) / (1 - 2ε)`, without bias if a share ε of the preferences is the wrong way round
    /// (arXiv 2403.00409).
    Robust,
}

/// The options of [`dpo_loss`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DpoConfig {
    /// How much the model is kept near its reference. 0.1
    pub beta: f64,
    /// [`DpoLossType::Sigmoid`]
    pub loss_type: DpoLossType,
    /// The share of preferences that are taken to be the wrong way round, below 0.5; for [`DpoLossType::Sigmoid`] and
    /// [`DpoLossType::Robust`]. 0
    pub label_smoothing: f64,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self { beta: 0.1, loss_type: DpoLossType::default(), label_smoothing: 0. }
    }
}

/// The loss of DPO, by which a model learns to prefer chosen answers to rejected ones more than a reference does:
/// a function of the margin `(policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)`, as
/// [`DpoLossType`] says. The rewards are `beta · (policy - reference)`.
///
/// The log-probabilities are sums over the tokens of an answer, from [`linear_log_probs`](super::super::linear_log_probs).
/// The reference is usually the model without its adapter, by [`Adapter::disabled`](crate::Adapter::disabled), or with
/// another one; its log-probabilities get no gradient, and can be computed once and kept.
///
/// ```
/// # fn main() -> candle_core::Result<()> {
/// use candle_core::{Device, Tensor, Var};
/// use loralib::train::{dpo_loss, DpoConfig, PairLogProbs};
///
/// let of_policy = Var::new(&[-10f32, -20., -11., -19.], &Device::Cpu)?;
/// let policy = PairLogProbs::split(&of_policy)?; // of two pairs
/// let reference = PairLogProbs::split(&Tensor::new(&[-12f32, -20., -11., -18.], &Device::Cpu)?)?;
/// let dpo = dpo_loss(&policy, &reference, &DpoConfig::default())?;
/// assert!((dpo.loss.to_scalar::<f32>()? - 0.6212).abs() < 1e-4);
/// let margins = (dpo.chosen_rewards - dpo.rejected_rewards)?;
/// assert!((margins.to_vec1::<f32>()?[0] - 0.2).abs() < 1e-6);
/// assert!(dpo.loss.backward()?.get(&of_policy).is_some());
/// # Ok(()) }
/// ```
///
/// # Errors
/// If the four vectors do not have the same length, or are empty, or an option is out of its range.
pub fn dpo_loss(
    policy: &PairLogProbs,
    reference: &PairLogProbs,
    cfg: &DpoConfig,
) -> Result<PreferenceLoss> {
    const NAME: &str = "dpo_loss";
    let &DpoConfig { beta, loss_type, label_smoothing } = cfg;
    positive(NAME, "beta", beta)?;
    if !(0. ..0.5).contains(&label_smoothing) {
        bail!("{NAME}: label_smoothing is {label_smoothing}, expected at least 0 and less than 0.5")
    }
    if label_smoothing > 0. && matches!(loss_type, DpoLossType::Hinge | DpoLossType::Ipo) {
        bail!("{NAME}: label_smoothing is {label_smoothing}: {loss_type:?} has none")
    }
    let (chosen, rejected) = policy.checked(NAME)?;
    let (ref_chosen, ref_rejected) = reference.checked(NAME)?;
    if chosen.dims() != ref_chosen.dims() {
        let (policy, reference) = (chosen.dims(), ref_chosen.dims());
        bail!("{NAME}: the policy's are {policy:?} and the reference's {reference:?}")
    }
    let chosen = (&chosen - ref_chosen.detach().to_dtype(chosen.dtype())?)?;
    let rejected = (&rejected - ref_rejected.detach().to_dtype(rejected.dtype())?)?;
    let margins = (&chosen - &rejected)?;
    let z = (&margins * beta)?;
    let losses = match loss_type {
        DpoLossType::Hinge => (1. - &z)?.relu()?,
        DpoLossType::Ipo => (margins - 0.5 / beta)?.sqr()?,
        DpoLossType::Sigmoid | DpoLossType::Robust => {
            let right = (log_sigmoid(&z)? * (label_smoothing - 1.))?;
            match label_smoothing {
                0. => right,
                share => {
                    let wrong = (log_sigmoid(&z.neg()?)? * share)?;
                    match loss_type {
                        DpoLossType::Robust => ((right + wrong)? / (1. - 2. * share))?,
                        _ => (right - wrong)?,
                    }
                }
            }
        }
    };
    Ok(PreferenceLoss {
        loss: losses.mean_all()?,
        chosen_rewards: (chosen.detach() * beta)?,
        rejected_rewards: (rejected.detach() * beta)?,
    })
}
