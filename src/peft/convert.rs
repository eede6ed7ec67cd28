//! Converts factors between loralib's shapes and PEFT's, with the same product.

use super::factors::Factors;
use super::{conv, experts, merged};
use crate::layers::LayerKind;
use candle_core::{bail, Result, Tensor};

/// loralib's factors of rank `r` as PEFT's.
pub(crate) fn to_peft(kind: &LayerKind, factors: Factors) -> Result<Factors> {
    let converted = match (kind.spatial(), kind) {
        (Some((n, groups)), _) => conv::to_peft(n, groups, &factors)?,
        (None, LayerKind::Linear | LayerKind::Embedding) => unchanged(&factors)?,
        (None, LayerKind::Parameter { .. }) => experts::to_peft(&factors)?,
        (None, _) => merged::to_peft(kind, &factors)?,
    };
    let Factors { a, b, r } = factors;
    let Some(converted) = converted else {
        bail!(
            "lora_A {:?} and lora_B {:?} of rank {r} are not those of a {kind:?}: declare the layer's \
             kind with `AdapterConfig::with_layer`",
            a.dims(),
            b.dims()
        )
    };
    Ok(converted)
}

fn unchanged(Factors { a, b, r }: &Factors) -> Result<Option<Factors>> {
    let fits = a.dims2()?.0 == *r && b.dims2()?.1 == *r;
    Ok(fits.then(|| Factors { a: a.clone(), b: b.clone(), r: *r }))
}

/// PEFT's factors as loralib's: the inverse of [`to_peft`].
pub(crate) fn from_peft(kind: &LayerKind, a: Tensor, b: Tensor) -> Result<Factors> {
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
    match kind {
        LayerKind::Linear | LayerKind::Embedding => Ok(Factors { r: a.dim(0)?, a, b }),
        LayerKind::MergedLinear(_) | LayerKind::MergedSplits(_) => merged::from_peft(kind, a, b),
        _ => conv::from_peft(groups, a, b),
    }
}
