//! Converts factors between loralib's shapes and PEFT's, with the same product. Most other formats have PEFT's shapes:
//! A (r, in) and B (out, r), or (r, in, k..) and (out, r, 1..) of a convolution.

mod experts;
mod fused;

use crate::layers::{ends_in, LayerKind, Part};
use crate::weights::pair::Pair;
use crate::weights::{conv, Factors, LayerWeights, LoraWeights};
use crate::{Error, Result};
use candle_core::{bail, Tensor};

pub(crate) use experts::from_peft as experts_from_peft;
pub(crate) use fused::from_peft_02;

/// A layer's factors in PEFT's shapes, with the rank and alpha that they have there.
pub(crate) fn to_peft(layer: &LayerWeights, rslora: bool) -> candle_core::Result<Factors> {
    let kind = layer.kind.as_ref().unwrap_or(&LayerKind::Linear);
    let pair = Pair { a: layer.a.clone(), b: layer.b.clone(), r: layer.r };
    let converted = match *kind {
        LayerKind::Linear | LayerKind::Embedding => unchanged(&pair)?,
        LayerKind::MergedLinear(_) | LayerKind::MergedSplits(_) => fused::to_peft(kind, &pair)?,
        LayerKind::Conv1d { groups } => conv::to_peft(1, groups, &pair, layer.conv_rank)?,
        LayerKind::Conv2d { groups } => conv::to_peft(2, groups, &pair, layer.conv_rank)?,
        LayerKind::Conv3d { groups } => conv::to_peft(3, groups, &pair, layer.conv_rank)?,
        LayerKind::Parameter { .. } => experts::to_peft(&pair)?,
    };
    match converted {
        Some(converted) => Ok(with_alpha(layer.factors(), converted, rslora)),
        None => bail!(
            "lora_A {:?} and lora_B {:?} of rank {} are not those of a {kind:?}: declare the layer's \
             kind with `AdapterConfig::with_layer`",
            pair.a.dims(),
            pair.b.dims(),
            pair.r
        ),
    }
}

/// Factors in PEFT's shapes as those of a layer of this kind: the inverse of [`to_peft`].
pub(crate) fn from_peft(
    kind: &LayerKind,
    factors: Factors,
    rslora: bool,
) -> candle_core::Result<Factors> {
    let (a, b) = (factors.a.clone(), factors.b.clone());
    let (n, groups) = kind.spatial().unwrap_or((0, 1));
    let fits = || {
        let (a, b) = (a.dims(), b.dims());
        let kernel = a.len() == n + 2 && b.len() == n + 2 && a[2..].iter().all(|k| *k == a[2]);
        let ranks = kernel && a[0] > 0 && Some(a[0]) == b[1].checked_mul(groups);
        ranks && b[2..].iter().all(|one| *one == 1)
    };
    if !fits() {
        bail!(
            "lora_A {:?} and lora_B {:?} are not those of a {kind:?} with equal kernel sizes",
            a.dims(),
            b.dims()
        )
    }
    let converted = match kind {
        LayerKind::Linear | LayerKind::Embedding => return Ok(factors),
        LayerKind::MergedLinear(_) | LayerKind::MergedSplits(_) => fused::from_peft(kind, a, b)?,
        LayerKind::Conv1d { .. } | LayerKind::Conv2d { .. } | LayerKind::Conv3d { .. } => {
            conv::from_peft(groups, a, b)?
        }
        LayerKind::Parameter { .. } => bail!("a parameter has no layer's factors"),
    };
    Ok(with_alpha(factors, converted, rslora))
}

/// A layer of this kind with factors in PEFT's shapes.
pub(crate) fn layer_from_peft(
    kind: LayerKind,
    factors: Factors,
    rslora: bool,
) -> candle_core::Result<LayerWeights> {
    let own = factors.b.dims().get(1).copied();
    let converted = from_peft(&kind, factors, rslora)?;
    let pair = Pair { a: converted.a.clone(), b: converted.b.clone(), r: converted.r };
    let conv_rank = kind.spatial().zip(own);
    let conv_rank =
        conv_rank.and_then(|((n, groups), own)| conv::rank_in_peft(n, groups, &pair, own));
    Ok(LayerWeights { conv_rank, ..LayerWeights::new(Some(kind), converted) })
}

/// The kind of a layer by the shapes of its factors. An error if it contradicts the `given` one.
pub(crate) fn kind(
    [a, b]: [&Tensor; 2],
    embedding: bool,
    given: Option<&LayerKind>,
) -> std::result::Result<LayerKind, String> {
    // A has the ranks of all groups, B those of one.
    let groups = match (a.dims(), b.dims()) {
        (&[ranks, ..], &[_, own, ..]) if ranks.checked_rem(own) == Some(0) => ranks / own,
        _ => 1,
    };
    let found = match (a.rank(), embedding) {
        (2, true) => LayerKind::Embedding,
        (2, false) => LayerKind::Linear,
        (3, false) => LayerKind::Conv1d { groups },
        (4, false) => LayerKind::Conv2d { groups },
        (5, false) => LayerKind::Conv3d { groups },
        _ => return Err(format!("its shape is {:?}", a.dims())),
    };
    match given {
        Some(given) if given.is_linear() && found == LayerKind::Linear => Ok(given.clone()),
        Some(given) if *given != found => {
            Err(format!("its layer is a {found:?}, declared as a {given:?}"))
        }
        _ => Ok(found),
    }
}

impl LoraWeights {
    /// The same adapter for a model in which layers have another kind, mostly
    /// [`MergedLinear`](crate::MergedLinear): those whose path is `module` or ends in it after a dot. Files of other
    /// formats have a fused projection as a linear layer.
    ///
    /// ```no_run
    /// # fn main() -> loralib::Result<()> {
    /// use loralib::{formats::peft, layers::LayerKind};
    /// let device = candle_core::Device::Cpu;
    /// let kind = LayerKind::MergedLinear(vec![true, false, true]);
    /// let weights = peft::load("adapter", &device)?.with_kind("c_attn", kind)?;
    /// # let _ = weights; Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the adapter has no such layer; and if the layer's kind is neither this one nor a linear layer's, or its
    /// update reaches outputs that are not enabled.
    pub fn with_kind(mut self, module: &str, kind: LayerKind) -> Result<Self> {
        let rslora = self.options.lora.rslora;
        let mut found = false;
        for (path, layer) in &mut self.layers {
            if !ends_in(path, module) {
                continue;
            }
            found = true;
            if layer.kind.as_ref() == Some(&kind) {
                continue;
            }
            let wrong = |reason: String| Error::tensor(Part::A.at(path), reason);
            let factors = to_peft(layer, rslora).map_err(|e| wrong(e.to_string()))?;
            if layer.kind.is_none() {
                // Its factors have the shapes of whatever layer it is of.
                let declared = LayerWeights { kind: Some(kind.clone()), ..layer.clone() };
                if to_peft(&declared, rslora).is_ok() {
                    *layer = declared;
                    continue;
                }
            }
            let embedding = layer.kind == Some(LayerKind::Embedding);
            let kind =
                self::kind([&factors.a, &factors.b], embedding, Some(&kind)).map_err(wrong)?;
            let LayerWeights { kind, r, lora_alpha, conv_rank, a, b, .. } =
                layer_from_peft(kind, factors, rslora).map_err(|e| wrong(e.to_string()))?;
            *layer = LayerWeights { kind, r, lora_alpha, conv_rank, a, b, ..layer.clone() };
        }
        match found {
            true => Self::of_layers(self.options.clone(), self.layers.clone())
                .map(|own| Self { options: own.options, ..self }),
            false => {
                let some: Vec<_> = self.layers.keys().take(3).collect();
                let reason = format!("the adapter has no such layer, but layers such as {some:?}");
                Err(Error::tensor(Part::A.at(module), reason))
            }
        }
    }
}

fn with_alpha(own: Factors, Pair { a, b, r }: Pair, rslora: bool) -> Factors {
    Factors { a, b, ..own.with_rank(r, rslora) }
}

fn unchanged(pair: &Pair) -> candle_core::Result<Option<Pair>> {
    let fits = pair.a.dims2()?.0 == pair.r && pair.b.dims2()?.1 == pair.r;
    Ok(fits.then(|| pair.clone()))
}
