//! PEFT's ways of combining adapters.

use super::add_weighted::{add_weighted, combined, common_kind, Summand};
use super::layer::LayerWeights;
use super::lora_weights::LoraWeights;
use super::products::{Nearest, Products};
use crate::ops::{svd, svd_of_product};
use crate::{Error, Result};
use candle_core::{bail, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::RefCell;

/// How [`add_weighted_with`] combines adapters; PEFT's `combination_type`.
///
/// The types whose names end in `Svd` combine the adapters' ΔW and decompose the result; `Linear` and the others combine
/// the factors A and the factors B, which is another update than the sum, and needs the same rank in all adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CombinationType {
    /// The nearest update of [`svd_rank`](AddWeightedConfig::svd_rank) to the sum. ΔW itself is never in memory.
    #[default]
    Svd,
    /// The sum, exactly, as [`add_weighted`] gives it.
    Cat,
    /// Sums of factors, each by the root of its weight.
    Linear,
    /// Sums of the values that have the sign of most, of those that are not pruned (arXiv 2306.01708).
    Ties,
    /// [`Ties`](Self::Ties) of ΔW.
    TiesSvd,
    /// Sums after random pruning, which leaves the expected value as it is (arXiv 2311.03099).
    DareLinear,
    /// [`DareLinear`](Self::DareLinear) of ΔW.
    DareLinearSvd,
    /// [`Ties`](Self::Ties) after random pruning.
    DareTies,
    /// [`DareTies`](Self::DareTies) of ΔW.
    DareTiesSvd,
    /// Sums of the values that are not pruned.
    MagnitudePrune,
    /// [`MagnitudePrune`](Self::MagnitudePrune) of ΔW.
    MagnitudePruneSvd,
}

/// Which sign counts where values have both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySignMethod {
    /// That of the sum.
    #[default]
    Total,
    /// That of more values.
    Frequency,
}

/// The options of [`add_weighted_with`], PEFT's with its defaults.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AddWeightedConfig {
    /// [`CombinationType::Svd`]
    pub combination_type: CombinationType,
    /// The rank of the result for the types with a decomposition. `None`: the greatest of the adapters
    pub svd_rank: Option<usize>,
    /// The share of the values that pruning keeps, 0 to 1; for the types that prune
    pub density: Option<f64>,
    /// [`MajoritySignMethod::Total`]
    pub majority_sign_method: MajoritySignMethod,
    /// Of random pruning. 0
    pub seed: u64,
}

/// The adapters combined into one as by PEFT's `add_weighted_adapter`, each by its weight, with a scaling of 1. It is
/// computed in F64; factors in half precision become F32.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Tensor};
/// use loralib::merge::{add_weighted_with, AddWeightedConfig, CombinationType};
/// use loralib::{LoraConfig, LoraWeights};
/// let factor = |dims: (usize, usize)| Tensor::randn(0f32, 1., dims, &Device::Cpu);
/// let adapter = || {
///     let tensors = [("q.lora_A".to_owned(), factor((2, 6))?), ("q.lora_B".to_owned(), factor((4, 2))?)];
///     LoraWeights::new(LoraConfig { r: 2, ..Default::default() }, tensors.into())
/// };
/// let (one, other) = (adapter()?, adapter()?);
/// let cfg = AddWeightedConfig {
///     combination_type: CombinationType::Ties,
///     density: Some(0.5),
///     ..Default::default()
/// };
/// let sum = add_weighted_with(&[(&one, 0.7), (&other, 0.3)], &cfg)?;
/// assert_eq!(sum.state_dict()["q.lora_A"].dims(), [2, 6]);
/// # Ok(()) }
/// ```
///
/// # Errors
/// As [`add_weighted`]; if an option is out of its range or missing; if factors that are combined have different ranks; if
/// `svd_rank` is above a side of a layer's matrix; and without the feature `faer` for a decomposition. Other types than
/// `Cat` refuse parameters, fused experts and convolutions with groups.
pub fn add_weighted_with(
    adapters: &[(&LoraWeights, f64)],
    cfg: &AddWeightedConfig,
) -> Result<LoraWeights> {
    let how = How::of(cfg)?;
    if cfg.combination_type == CombinationType::Cat {
        return add_weighted(adapters);
    }
    let own = adapters.iter().flat_map(|(own, _)| own.layers.values());
    let most = own.map(|layer| layer.conv_rank.unwrap_or(layer.r)).max();
    let rank = cfg.svd_rank.or(most).unwrap_or(0);
    let rng = RefCell::new(ChaCha8Rng::seed_from_u64(cfg.seed));
    combined(adapters, |summands, rslora| {
        let kind = common_kind(summands)?;
        let layers = summands.iter().map(|own| {
            let layer = LayerWeights { kind: kind.clone(), ..own.layer.clone() };
            Products::of(&layer)
        });
        let layers = layers.collect::<candle_core::Result<Vec<_>>>()?;
        let products = (0..layers[0].products.len()).map(|i| {
            let shape = |[a, b]: &[Tensor; 2]| Ok::<_, candle_core::Error>((a.dim(1)?, b.dim(0)?));
            let parts: Vec<_> = layers.iter().filter_map(|own| own.products.get(i)).collect();
            for part in &parts {
                if parts.len() < layers.len() || shape(part)? != shape(parts[0])? {
                    bail!("the shapes of lora_A and lora_B do not fit the other adapters")
                }
            }
            match how.decomposes {
                true => {
                    let (columns, rows) = shape(parts[0])?;
                    let given = cfg.svd_rank.filter(|rank| *rank > rows.min(columns));
                    if let Some(rank) = given {
                        bail!("svd_rank is {rank}, its matrix is {rows} by {columns}")
                    }
                    how.of_updates(&parts, summands, rank, &rng)
                }
                false => how.of_factors(&parts, summands, &rng),
            }
        });
        let products = layers[0].with(products.collect::<candle_core::Result<_>>()?);
        let like = LayerWeights { kind, ..summands[0].layer.clone() };
        products.into_layer(&like, 1., rslora)
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pruning {
    None,
    Magnitude,
    Random,
}

/// What a [`CombinationType`] consists of.
#[derive(Debug, Clone, Copy)]
struct How {
    /// Of ΔW, not of the factors.
    decomposes: bool,
    pruning: Pruning,
    /// Values count that have the sign of most.
    elects: Option<MajoritySignMethod>,
    density: f64,
}

impl How {
    fn of(cfg: &AddWeightedConfig) -> Result<Self> {
        use CombinationType::*;
        use Pruning::*;
        let AddWeightedConfig { combination_type, svd_rank, density, .. } = *cfg;
        let (decomposes, pruning, elects) = match combination_type {
            Cat | Linear => (false, None, false),
            Svd => (true, None, false),
            Ties => (false, Magnitude, true),
            TiesSvd => (true, Magnitude, true),
            DareLinear => (false, Random, false),
            DareLinearSvd => (true, Random, false),
            DareTies => (false, Random, true),
            DareTiesSvd => (true, Random, true),
            MagnitudePrune => (false, Magnitude, false),
            MagnitudePruneSvd => (true, Magnitude, false),
        };
        let invalid = |reason: String| Err(Error::Invalid(format!("add_weighted_with: {reason}")));
        let density = match (pruning, density) {
            (None, Option::None) => 1.,
            (None, Some(_)) => return invalid(format!("{combination_type:?} has no density")),
            (_, Option::None) => return invalid(format!("{combination_type:?} needs a density")),
            (Random, Some(0.)) => return invalid("random pruning to a density of 0".to_owned()),
            (_, Some(density)) if (0. ..=1.).contains(&density) => density,
            (_, Some(density)) => {
                return invalid(format!("the density is {density}, expected 0 to 1"))
            }
        };
        match svd_rank {
            Some(0) => return invalid("svd_rank is 0".to_owned()),
            Some(_) if !decomposes => {
                return invalid(format!("{combination_type:?} has no svd_rank"));
            }
            _ => {}
        }
        let elects = elects.then_some(cfg.majority_sign_method);
        Ok(Self { decomposes, pruning, elects, density })
    }

    /// A and B from all A and all B.
    fn of_factors(
        &self,
        parts: &[&[Tensor; 2]],
        summands: &[Summand],
        rng: &RefCell<ChaCha8Rng>,
    ) -> candle_core::Result<[Tensor; 2]> {
        let ranks: Vec<_> = parts.iter().map(|[a, _]| a.dims()[0]).collect();
        if let Some(other) = ranks.iter().find(|rank| **rank != ranks[0]) {
            bail!(
                "its rank is {} in one adapter and {other} in another: factors of different ranks have no sum, a \
                 type with a decomposition combines them",
                ranks[0]
            )
        }
        let all = |i: usize| -> Vec<_> { parts.iter().map(|part| part[i].clone()).collect() };
        let (a, b) = (all(0), all(1));
        // Both factors have the root of the weight, and A its sign.
        let weights = summands.iter().map(|own| own.weight * own.scaling);
        let signed: Vec<_> = weights.map(|weight| weight.abs().sqrt().copysign(weight)).collect();
        let roots: Vec<_> = signed.iter().map(|weight| weight.abs()).collect();
        Ok([self.combine(&a, &signed, rng)?, self.combine(&b, &roots, rng)?])
    }

    /// The nearest product of a rank to all ΔW combined.
    fn of_updates(
        &self,
        parts: &[&[Tensor; 2]],
        summands: &[Summand],
        rank: usize,
        rng: &RefCell<ChaCha8Rng>,
    ) -> candle_core::Result<[Tensor; 2]> {
        let parts = || parts.iter().zip(summands);
        let svd = if self.pruning == Pruning::None {
            let all_a: Vec<_> = parts().map(|([a, _], _)| a.clone()).collect();
            let weighted = parts().map(|([_, b], own)| b * (own.weight * own.scaling));
            let all_b = weighted.collect::<candle_core::Result<Vec<_>>>()?;
            svd_of_product(&Tensor::cat(&all_b, 1)?, &Tensor::cat(&all_a, 0)?)?
        } else {
            let updates = parts().map(|([a, b], own)| b.matmul(a)? * own.scaling);
            let updates = updates.collect::<candle_core::Result<Vec<_>>>()?;
            let weights: Vec<_> = summands.iter().map(|own| own.weight).collect();
            let combined = self.combine(&updates, &weights, rng)?;
            let (m, n) = combined.dims2()?;
            svd(&combined, m.min(n), None)?
        };
        Ok(Nearest::of(&svd, rank)?.product)
    }

    /// The tensors pruned, weighted and added.
    fn combine(
        &self,
        tensors: &[Tensor],
        weights: &[f64],
        rng: &RefCell<ChaCha8Rng>,
    ) -> candle_core::Result<Tensor> {
        let values = tensors.iter().map(|t| self.pruned(t.flatten_all()?.to_vec1()?, rng));
        let values = values.collect::<candle_core::Result<Vec<_>>>()?;
        let combined = |i: usize| {
            let of_all = || values.iter().map(|values| values[i]).zip(weights);
            let Some(method) = self.elects else {
                return of_all().map(|(value, weight)| value * weight).sum();
            };
            let sign = |value: f64| if value == 0. { 0. } else { value.signum() };
            let sum: f64 = match method {
                MajoritySignMethod::Total => of_all().map(|(value, _)| value).sum(),
                MajoritySignMethod::Frequency => of_all().map(|(value, _)| sign(value)).sum(),
            };
            let elected = if sum >= 0. { 1. } else { -1. };
            let (mut sum, mut count) = (0., 0usize);
            for (value, weight) in of_all().filter(|(value, _)| sign(*value) == elected) {
                sum += value * weight;
                count += 1;
            }
            sum / count.max(1) as f64
        };
        let shape = tensors[0].dims();
        let combined: Vec<f64> = (0..tensors[0].elem_count()).map(combined).collect();
        Tensor::from_vec(combined, shape, &Device::Cpu)
    }

    fn pruned(
        &self,
        mut values: Vec<f64>,
        rng: &RefCell<ChaCha8Rng>,
    ) -> candle_core::Result<Vec<f64>> {
        match self.pruning {
            _ if self.density == 1. => {}
            Pruning::None => {}
            Pruning::Magnitude => {
                let kept = (self.density * values.len() as f64) as usize;
                let mut order: Vec<_> = (0..values.len()).collect();
                order.sort_by(|i, j| values[*j].abs().total_cmp(&values[*i].abs()));
                order[kept..].iter().for_each(|i| values[*i] = 0.);
            }
            Pruning::Random => {
                let mut rng = rng.borrow_mut();
                values.iter_mut().for_each(|value| {
                    *value = if rng.random_bool(self.density) { *value / self.density } else { 0. };
                });
            }
        }
        Ok(values)
    }
}
