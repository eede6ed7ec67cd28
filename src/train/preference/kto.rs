//! Preference optimization from single answers.

use super::scores::{computed, log_sigmoid, positive};
use candle_core::{bail, Result, Tensor};

/// The options of [`kto_loss`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KtoConfig {
    /// How much the model is kept near its reference. 0.1
    pub beta: f64,
    /// The weight of desirable answers; against unlike numbers of the two kinds. 1
    pub desirable_weight: f64,
    /// The weight of undesirable answers. 1
    pub undesirable_weight: f64,
}

impl Default for KtoConfig {
    fn default() -> Self {
        Self { beta: 0.1, desirable_weight: 1., undesirable_weight: 1. }
    }
}

/// The loss of some answers, and the rewards that it implies.
#[derive(Debug, Clone)]
pub struct KtoLoss {
    /// The mean over the answers, a scalar.
    pub loss: Tensor,
    /// `beta · (policy - reference)` (answers), without a graph.
    pub rewards: Tensor,
}

/// The loss of KTO (arXiv 2402.01306), which learns from answers that are desirable or not, without pairs: the mean of
/// `w · (1 - σ(beta · (policy - reference - kl)))` for desirable ones, and of `w · (1 - σ(beta · (kl - policy + reference)))`
/// for the others.
///
/// `policy` and `reference` are log-probabilities (answers), sums over an answer's tokens. `kl` estimates how far the model
/// is from its reference: the mean of `policy - reference` over answers that belong to other prompts, such as each
/// prompt's with the next one's answer; below 0 it counts as 0.
///
/// # Errors
/// If there are not as many of each, or none, `kl` is NaN, or an option is out of its range.
pub fn kto_loss(
    policy: &Tensor,
    reference: &Tensor,
    desirable: &[bool],
    kl: f64,
    cfg: &KtoConfig,
) -> Result<KtoLoss> {
    const NAME: &str = "kto_loss";
    let &KtoConfig { beta, desirable_weight, undesirable_weight } = cfg;
    positive(NAME, "beta", beta)?;
    for (option, weight) in
        [("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)]
    {
        if !(weight >= 0. && weight.is_finite()) {
            bail!("{NAME}: {option} is {weight}, expected at least 0")
        }
    }
    let count = desirable.len();
    if [policy, reference].iter().any(|x| x.dims() != [count]) || count == 0 {
        let (policy, reference) = (policy.dims(), reference.dims());
        bail!(
            "{NAME}: policy is {policy:?}, reference {reference:?} and desirable [{count}], expected (answers), at \
             least one"
        )
    }
    if !kl.is_finite() {
        bail!("{NAME}: kl is {kl}")
    }
    let policy = computed(policy)?;
    let ratios = (&policy - reference.detach().to_dtype(policy.dtype())?)?;
    let per_answer = |of: &dyn Fn(bool) -> f64| {
        let values: Vec<_> = desirable.iter().map(|desirable| of(*desirable) as f32).collect();
        Tensor::new(values, policy.device())?.to_dtype(policy.dtype())
    };
    let signs = per_answer(&|desirable| if desirable { -1. } else { 1. })?;
    let weights = per_answer(&|desirable| match desirable {
        true => desirable_weight,
        false => undesirable_weight,
    })?;
    // 1 - σ(z) = σ(-z)
    let z = (((&ratios - kl.max(0.))? * signs)? * beta)?;
    let losses = (log_sigmoid(&z)?.exp()? * weights)?;
    Ok(KtoLoss { loss: losses.mean_all()?, rewards: (ratios.detach() * beta)? })
}
