//! The weighted sum of adapters.

use super::config::AdapterConfig;
use super::conv;
use super::layer::{Factors, LayerWeights};
use super::lora_weights::LoraWeights;
use super::pair::Pair;
use super::products::of_kernels;
use crate::layers::{LayerKind, Part};
use crate::{Error, Result};
use candle_core::{bail, DType, Tensor};
use std::collections::BTreeSet;

/// The adapter whose `B·A` is the weighted sum of the given adapters', exactly: the ranks are concatenated and `B` is
/// multiplied by the weight.
///
/// A layer's rank is the sum of the adapters' that have it, its scaling that of the first of them; where another has a
/// different one, its weight is multiplied by the ratio. Half-precision factors are converted to F32, so that weighting does not
/// round them.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Tensor};
/// use loralib::{merge::add_weighted, LoraConfig, LoraWeights};
/// let factor = |dims: (usize, usize)| Tensor::ones(dims, DType::F32, &Device::Cpu);
/// let tensors = [
///     ("q.lora_A".to_owned(), factor((2, 6))?),
///     ("q.lora_B".to_owned(), factor((4, 2))?),
/// ];
/// let cfg = LoraConfig { r: 2, ..Default::default() };
/// let adapter = LoraWeights::new(cfg, tensors.into())?;
/// let sum = add_weighted(&[(&adapter, 0.7), (&adapter, -0.2)])?;
/// assert_eq!(sum.state_dict()["q.lora_A"].dims(), [4, 6]);
/// # Ok(()) }
/// ```
///
/// # Errors
/// If there are no adapters, a weight is not finite, two adapters have no layer in common or differ in its kind or shape,
/// or one has a tensor that is not a factor: biases, heads and DoRA's magnitudes have no such sum.
pub fn add_weighted(adapters: &[(&LoraWeights, f64)]) -> Result<LoraWeights> {
    combined(adapters, sum)
}

/// The layers of all adapters, each by `combine` from those that have it; `rslora` is the first adapter's.
pub(super) fn combined(
    adapters: &[(&LoraWeights, f64)],
    combine: impl Fn(&[Summand], bool) -> candle_core::Result<LayerWeights>,
) -> Result<LoraWeights> {
    // The experts of fused parameters one by one.
    let (mut unfused, mut parameters) = (vec![], BTreeSet::new());
    for (adapter, weight) in adapters {
        let (adapter, own) = (*adapter).clone().with_unfused()?;
        unfused.push((adapter, *weight));
        parameters.extend(own);
    }
    let adapters: Vec<_> = unfused.iter().map(|(adapter, weight)| (adapter, *weight)).collect();
    let Some((first, _)) = adapters.first() else {
        return Err(Error::Invalid("there are no adapters to add".to_owned()));
    };
    for (adapter, weight) in &adapters {
        check(adapter)?;
        if !adapter.layers.keys().any(|path| first.layers.contains_key(path)) {
            let path = |own: &LoraWeights| own.layers.keys().next().cloned();
            let (one, other) = (path(first), path(adapter));
            let reason = format!(
                "the adapters have different layers, none in common: such as {one:?} and {other:?}"
            );
            return Err(Error::Invalid(reason));
        }
        let tying = |own: &LoraWeights| own.options.ensure_weight_tying;
        let table = first.tied_without_factors().filter(|_| tying(adapter) != tying(first));
        if let Some(path) = table {
            let reason =
                "a head that is tied to this table follows it in one adapter and not in another";
            return Err(Error::tensor(Part::A.at(path), reason));
        }
        if !weight.is_finite() {
            return Err(Error::Invalid(format!("the weight of an adapter is {weight}")));
        }
    }
    let paths: BTreeSet<_> = adapters.iter().flat_map(|(own, _)| own.layers.keys()).collect();
    let rslora = first.options.lora.rslora;
    let layers = paths.into_iter().map(|path| {
        let summands = adapters.iter().filter_map(|(own, weight)| {
            let scaling = own.lora_config(path)?.scaling();
            Some(Summand { layer: own.layers.get(path)?, weight: *weight, scaling })
        });
        let layer = combine(&summands.collect::<Vec<_>>(), rslora);
        Ok((path.clone(), layer.map_err(|e| Error::tensor(Part::A.at(path), e))?))
    });
    let layers = layers.collect::<Result<_>>()?;
    let (bias, modules_to_save) = Default::default();
    let options = AdapterConfig { bias, modules_to_save, ..first.options.clone() };
    LoraWeights::of_layers(options, layers)?.with_fused(|path| parameters.contains(path))
}

/// The update of a layer by one of the adapters.
pub(super) struct Summand<'a> {
    pub layer: &'a LayerWeights,
    pub weight: f64,
    pub scaling: f64,
}

/// An error if an adapter has something else than trained factors.
fn check(adapter: &LoraWeights) -> Result<()> {
    let parts = adapter.layers.iter().filter_map(|(path, own)| Some((path, own.other_part()?)));
    let rows = adapter.token_rows.keys().map(|path| (path, Part::TokenRows));
    let reason = |initial: bool| match initial {
        true => "initial factors have no weighted sum: load the adapters by `Adapter::load`",
        false => "only lora_A and lora_B have a weighted sum",
    };
    if let Some((path, part)) = parts.chain(rows).next() {
        return Err(Error::tensor(part.at(path), reason(part.is_initial())));
    }
    match adapter.others.keys().next() {
        Some(name) => Err(Error::tensor(name, reason(false))),
        None => Ok(()),
    }
}

/// The sum of a layer's updates. A is (splits·r, in) and B (outputs, r), with several splits in a merged linear layer.
fn sum(summands: &[Summand], rslora: bool) -> candle_core::Result<LayerWeights> {
    let Some(&Summand { layer, scaling, .. }) = summands.first() else {
        bail!("no adapter has it")
    };
    let kind = common_kind(summands)?;
    if let Some(sum) = sum_of_kernels(summands, rslora)? {
        return Ok(sum);
    }
    if layer.is_parameter() {
        bail!("it is of a parameter, whose updates have no sum")
    }
    let (mut all_a, mut all_b, mut common) = (vec![], vec![], None);
    for Summand { layer: own, weight, scaling: own_scaling } in summands {
        let (a, b) = (&own.a, &own.b);
        let ((rows, columns), (outs, r)) = (a.dims2()?, b.dims2()?);
        let splits = rows.checked_div(r).filter(|splits| splits * r == rows);
        let shape = (splits, columns, outs);
        if splits.is_none() || *common.get_or_insert(shape) != shape {
            bail!(
                "the shapes of lora_A {:?} and lora_B {:?} do not fit the other adapters",
                a.dims(),
                b.dims()
            )
        }
        let upcast = |t: &Tensor| match t.dtype() {
            DType::F16 | DType::BF16 => t.to_dtype(DType::F32),
            _ => Ok(t.clone()),
        };
        let ratio = match *own_scaling == scaling {
            true => 1.,
            false if scaling == 0. => {
                bail!("the first adapter's scaling is 0, another's {own_scaling}")
            }
            false => own_scaling / scaling,
        };
        all_a.push(upcast(a)?.reshape((rows / r, r, columns))?);
        all_b.push((upcast(b)? * (weight * ratio))?);
    }
    let a = Tensor::cat(&all_a, 1)?;
    let (splits, ranks, columns) = a.dims3()?;
    let a = a.reshape((splits * ranks, columns))?;
    let r = summands.iter().map(|own| own.layer.r).sum();
    let factors =
        Factors { a, b: Tensor::cat(&all_b, 1)?, r: layer.r, lora_alpha: layer.lora_alpha };
    let fan_in_fan_out = layer.fan_in_fan_out;
    Ok(LayerWeights { fan_in_fan_out, ..LayerWeights::new(kind, factors.with_rank(r, rslora)) })
}

/// The kind of a layer, which may be unknown in some adapters.
pub(super) fn common_kind(summands: &[Summand]) -> candle_core::Result<Option<LayerKind>> {
    let mut kinds = summands.iter().filter_map(|own| own.layer.kind.as_ref());
    let kind = kinds.next();
    match kinds.find(|other| Some(*other) != kind).zip(kind) {
        Some((other, kind)) => {
            bail!("its layer is a {kind:?} in one adapter, a {other:?} in another")
        }
        None => Ok(kind.cloned()),
    }
}

/// The sum of updates of a convolution whose factors are copies of PEFT's: their ranks add up. `None` for others.
fn sum_of_kernels(summands: &[Summand], rslora: bool) -> candle_core::Result<Option<LayerWeights>> {
    let kind = summands[0].layer.kind.clone();
    let Some((n, 1)) = kind.as_ref().and_then(LayerKind::spatial) else { return Ok(None) };
    let (mut all_a, mut all_b) = (vec![], vec![]);
    for Summand { layer: own, weight, scaling } in summands {
        let pair = Pair { a: own.a.clone(), b: own.b.clone(), r: own.r };
        let (true, Some(rank)) = (own.kind == kind, own.conv_rank) else { return Ok(None) };
        let Some(pair) = conv::to_peft(n, 1, &pair, Some(rank))? else { return Ok(None) };
        let wide = |t: &Tensor| match t.dtype() {
            DType::F16 | DType::BF16 => t.to_dtype(DType::F32),
            _ => Ok(t.clone()),
        };
        all_a.push(wide(&pair.a)?);
        all_b.push((wide(&pair.b)? * (weight * scaling))?);
    }
    let factors = [Tensor::cat(&all_a, 0)?, Tensor::cat(&all_b, 1)?];
    of_kernels(kind, factors, 1., rslora).map(Some)
}
