//! Group relative policy optimization.

use super::scores::computed;
use candle_core::{bail, DType, Result, Tensor};

/// How [`grpo_loss`] becomes one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GrpoLossType {
    /// The mean over all tokens of the batch (arXiv 2503.14476).
    #[default]
    Dapo,
    /// The mean over the answers of the mean over their tokens (arXiv 2402.03300).
    Grpo,
    /// The sum over all tokens divided by answers · `max_completion_length`, which favours no length (arXiv 2503.20783).
    DrGrpo {
        /// The most tokens of an answer.
        max_completion_length: usize,
    },
}

/// What [`grpo_loss`] weighs by the ratio of the probabilities now and at the time of sampling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImportanceSamplingLevel {
    /// Each token by its own.
    #[default]
    Token,
    /// All tokens of an answer by the geometric mean of theirs, as GSPO does (arXiv 2507.18071).
    Sequence,
}

/// The options of [`grpo_loss`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GrpoConfig {
    /// The weight of the KL divergence from a reference. 0
    pub beta: f64,
    /// Ratios below `1 - epsilon` are clipped. 0.2
    pub epsilon: f64,
    /// Ratios above `1 + epsilon_high` are clipped. `None`: `epsilon`
    pub epsilon_high: Option<f64>,
    /// The largest ratio, also where the advantage is negative. `None`: any
    pub delta: Option<f64>,
    /// [`GrpoLossType::Dapo`]
    pub loss_type: GrpoLossType,
    /// [`ImportanceSamplingLevel::Token`]
    pub importance_sampling_level: ImportanceSamplingLevel,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self {
            beta: 0.,
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            loss_type: GrpoLossType::default(),
            importance_sampling_level: ImportanceSamplingLevel::default(),
        }
    }
}

/// Sampled answers, one in each row.
#[derive(Debug, Clone, Copy)]
pub struct GrpoBatch<'a> {
    /// The model's log-probabilities of their tokens (answers, tokens).
    pub log_probs: &'a Tensor,
    /// The same of the model that sampled them, or `None` if it has not been trained since.
    pub old: Option<&'a Tensor>,
    /// The same of the reference, for [`beta`](GrpoConfig::beta).
    pub reference: Option<&'a Tensor>,
    /// 1 for an answer's tokens, 0 for padding (answers, tokens).
    pub mask: &'a Tensor,
    /// How much better an answer is than others (answers), as of [`group_advantages`].
    pub advantages: &'a Tensor,
}

/// The clipped objective of GRPO: of each token `-min(ratio·advantage, clip(ratio)·advantage)`, with the ratio
/// `exp(log_probs - old)`, and with `beta` the KL divergence from the reference,
/// `beta · (exp(reference - log_probs) - (reference - log_probs) - 1)`; a scalar, by [`GrpoConfig::loss_type`].
///
/// ```
/// # fn main() -> candle_core::Result<()> {
/// use candle_core::{Device, Tensor, Var};
/// use loralib::train::{group_advantages, grpo_loss, GrpoBatch, GrpoConfig, ScaleRewards};
///
/// // Two answers to each of two prompts, with their rewards.
/// let advantages = group_advantages(&[1., 0., 0.5, 0.7], 2, ScaleRewards::Group)?;
/// let advantages = Tensor::new(advantages, &Device::Cpu)?;
/// let log_probs = Var::rand(-3f32, 0., (4, 5), &Device::Cpu)?;
/// let mask = Tensor::ones((4, 5), candle_core::DType::U8, &Device::Cpu)?;
/// let (old, reference) = (None, None);
/// let batch = GrpoBatch { log_probs: &log_probs, old, reference, mask: &mask, advantages: &advantages };
/// let loss = grpo_loss(&batch, &GrpoConfig::default())?;
/// assert!(loss.backward()?.get(&log_probs).is_some());
/// # Ok(()) }
/// ```
///
/// # Errors
/// If shapes do not fit, the mask is all 0, `beta` has no reference, or an option is out of its range.
pub fn grpo_loss(batch: &GrpoBatch, cfg: &GrpoConfig) -> Result<Tensor> {
    const NAME: &str = "grpo_loss";
    let &GrpoConfig { beta, epsilon, epsilon_high, delta, loss_type, importance_sampling_level } =
        cfg;
    let high = epsilon_high.unwrap_or(epsilon);
    for (option, value) in [
        ("beta", beta),
        ("epsilon", epsilon),
        ("epsilon_high", high),
        ("delta", delta.unwrap_or(0.)),
    ] {
        if !(value >= 0. && value.is_finite()) {
            bail!("{NAME}: {option} is {value}, expected at least 0")
        }
    }
    let log_probs = computed(batch.log_probs)?;
    let (answers, tokens) = log_probs.dims2()?;
    let like = |name: &str, x: &Tensor| {
        if x.dims() != [answers, tokens] {
            bail!("{NAME}: log_probs is [{answers}, {tokens}] and {name} {:?}", x.dims())
        }
        x.detach().to_dtype(log_probs.dtype())
    };
    let mask = like("mask", batch.mask)?;
    if batch.advantages.dims() != [answers] {
        let dims = batch.advantages.dims();
        bail!("{NAME}: advantages is {dims:?}, expected one for each of the {answers} answers")
    }
    let advantages = batch.advantages.detach().to_dtype(log_probs.dtype())?.unsqueeze(1)?;
    let counts = mask.sum_keepdim(1)?;
    let count = counts.sum_all()?;
    if count.to_dtype(DType::F32)?.to_scalar::<f32>()? == 0. {
        bail!("{NAME}: the mask is all 0")
    }
    let old = match batch.old {
        Some(old) => like("old", old)?,
        None => log_probs.detach(),
    };
    let log_ratios = (&log_probs - old)?;
    let ratios = match importance_sampling_level {
        ImportanceSamplingLevel::Token => log_ratios,
        ImportanceSamplingLevel::Sequence => {
            (&log_ratios * &mask)?.sum_keepdim(1)?.div(&counts.maximum(1.)?)?
        }
    };
    let ratios = ratios.exp()?;
    let clipped = ratios.clamp(1. - epsilon, 1. + high)?;
    let ratios = match delta {
        Some(delta) => ratios.minimum(delta)?,
        None => ratios,
    };
    let (plain, clipped) =
        (ratios.broadcast_mul(&advantages)?, clipped.broadcast_mul(&advantages)?);
    let mut losses = plain.minimum(&clipped)?.neg()?;
    if beta > 0. {
        let Some(reference) = batch.reference else {
            bail!("{NAME}: beta is {beta}, without a reference")
        };
        let ratios = (like("reference", reference)? - &log_probs)?;
        let kl = ((ratios.exp()? - ratios)? - 1.)?;
        losses = losses.broadcast_add(&(kl * beta)?)?;
    }
    let losses = losses.broadcast_mul(&mask)?;
    match loss_type {
        GrpoLossType::Dapo => losses.sum_all()?.div(&count),
        GrpoLossType::Grpo => losses.sum_keepdim(1)?.div(&counts.maximum(1.)?)?.mean_all(),
        GrpoLossType::DrGrpo { max_completion_length: 0 } => {
            bail!("{NAME}: max_completion_length is 0")
        }
        GrpoLossType::DrGrpo { max_completion_length } => {
            losses.sum_all()? / (answers * max_completion_length) as f64
        }
    }
}

/// By what rewards are divided in [`group_advantages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScaleRewards {
    /// The standard deviation of their group.
    #[default]
    Group,
    /// The standard deviation of all of them.
    Batch,
    /// Nothing, as Dr. GRPO proposes.
    None,
}

/// How much better each answer is than the others to the same prompt: `(reward - mean) / (std + 1e-4)`, with the mean of its
/// group and the standard deviation that `scale` says, without bias. Groups are `num_generations` rewards, one after
/// another.
///
/// # Errors
/// If the groups have fewer than two rewards, the last one has too few, or a reward is not finite.
pub fn group_advantages(
    rewards: &[f64],
    num_generations: usize,
    scale: ScaleRewards,
) -> Result<Vec<f64>> {
    const NAME: &str = "group_advantages";
    if num_generations < 2 {
        bail!("{NAME}: num_generations is {num_generations}: an answer alone is not better than others")
    }
    if rewards.is_empty() || !rewards.len().is_multiple_of(num_generations) {
        let count = rewards.len();
        bail!("{NAME}: {count} rewards, expected some groups of {num_generations}")
    }
    if let Some((i, reward)) = rewards.iter().enumerate().find(|(_, reward)| !reward.is_finite()) {
        bail!("{NAME}: reward {i} is {reward}")
    }
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let std = |of: &[f64]| {
        let mean = mean(of);
        let squares: f64 = of.iter().map(|reward| (reward - mean).powi(2)).sum();
        (squares / (of.len() - 1) as f64).sqrt()
    };
    let advantages = rewards.chunks(num_generations).flat_map(|group| {
        let (mean, by) = match scale {
            ScaleRewards::Group => (mean(group), std(group) + 1e-4),
            ScaleRewards::Batch => (mean(group), std(rewards) + 1e-4),
            ScaleRewards::None => (mean(group), 1.),
        };
        group.iter().map(move |reward| (reward - mean) / by)
    });
    Ok(advantages.collect())
}
