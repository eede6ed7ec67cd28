//! loralib's factors as PEFT's, and back, with the same product.

use super::{conv, Kind, Total};
use candle_core::{bail, DType, Device, Result, Tensor};

/// The factors of a layer and its rank.
#[derive(Debug)]
pub(super) struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    pub r: usize,
}

/// loralib's factors of rank `r` as PEFT's.
pub(super) fn to_peft(kind: &Kind, factors: Factors) -> Result<Factors> {
    let converted = match (kind.spatial(), kind) {
        (Some((n, groups)), _) => conv::to_peft(n, groups, &factors)?,
        (None, Kind::Linear | Kind::Embedding) => plain(&factors)?,
        (None, _) => merged_to_peft(kind, &factors)?,
    };
    let Factors { a, b, r } = factors;
    let Some(converted) = converted else {
        bail!(
            "lora_A {:?} and lora_B {:?} of rank {r} do not make a {kind:?}: say in the \
             configuration what this layer is",
            a.dims(),
            b.dims()
        )
    };
    Ok(converted)
}

fn plain(Factors { a, b, r }: &Factors) -> Result<Option<Factors>> {
    let fits = a.dims2()?.0 == *r && b.dims2()?.1 == *r;
    Ok(fits.then(|| Factors { a: a.clone(), b: b.clone(), r: *r }))
}

/// The parts' outputs lie one after another, and each has ranks of its own.
fn merged_to_peft(kind: &Kind, Factors { a, b, r }: &Factors) -> Result<Option<Factors>> {
    let ((rows, _), (outs, ranks)) = (a.dims2()?, b.dims2()?);
    let Some(splits) = kind.splits(Total::Enabled(outs)) else { return Ok(None) };
    let parts = splits.iter().filter(|(_, on)| *on).count();
    if ranks != *r || rows != r * parts {
        return Ok(None);
    }
    let (mut blocks, mut row, mut part) = (vec![], 0, 0);
    for (size, on) in splits {
        blocks.push(match on {
            false => Tensor::zeros((size, rows), b.dtype(), b.device())?,
            true => {
                let block = b.narrow(0, row, size)?;
                let block = block.pad_with_zeros(1, part * r, rows - (part + 1) * r)?;
                (row, part) = (row + size, part + 1);
                block
            }
        });
    }
    Ok(Some(Factors { a: a.clone(), b: Tensor::cat(&blocks, 0)?, r: rows }))
}

/// PEFT's factors as loralib's. What [`to_peft`] made comes back as it was.
pub(super) fn from_peft(kind: &Kind, a: Tensor, b: Tensor) -> Result<Factors> {
    let (n, groups) = kind.spatial().unwrap_or((0, 1));
    let fits = || {
        let (a, b) = (a.dims(), b.dims());
        let kernel = a.len() == n + 2 && b.len() == n + 2 && a[2..].iter().all(|k| *k == a[2]);
        let ranks = kernel && a[0] > 0 && Some(a[0]) == b[1].checked_mul(groups);
        ranks && b[2..].iter().all(|one| *one == 1)
    };
    if !fits() {
        bail!(
            "lora_A {:?} and lora_B {:?} are not the factors of a {kind:?} with a kernel of one size",
            a.dims(),
            b.dims()
        )
    }
    match kind {
        Kind::Linear | Kind::Embedding => Ok(Factors { r: a.dim(0)?, a, b }),
        Kind::MergedLinear(_) | Kind::Splits(_) => merged_from_peft(kind, a, b),
        _ => conv::from_peft(groups, a, b),
    }
}

fn merged_from_peft(kind: &Kind, a: Tensor, b: Tensor) -> Result<Factors> {
    let (out, ranks) = b.dims2()?;
    let Some(splits) = kind.splits(Total::All(out)) else {
        bail!("{kind:?} does not make up {out} outputs")
    };
    let (mut parts, mut row) = (vec![], 0);
    for (size, on) in splits {
        let part = b.narrow(0, row, size)?;
        row += size;
        if on {
            parts.push(part);
        } else if !is_zero(&part)? {
            bail!("lora_B {:?} changes outputs that {kind:?} has no update for", b.dims())
        }
    }
    let Some(own) = ranks.checked_div(parts.len()) else { bail!("{kind:?} has no update") };
    let mut diagonal = own * parts.len() == ranks;
    for (i, part) in parts.iter().enumerate() {
        diagonal = diagonal
            && is_zero(&part.narrow(1, 0, i * own)?)?
            && is_zero(&part.narrow(1, (i + 1) * own, ranks - (i + 1) * own)?)?;
    }
    if !diagonal {
        // Every part with all of the ranks.
        let a = Tensor::cat(&vec![a; parts.len()], 0)?;
        return Ok(Factors { a, b: Tensor::cat(&parts, 0)?, r: ranks });
    }
    let blocks: Result<Vec<_>> =
        parts.iter().enumerate().map(|(i, part)| part.narrow(1, i * own, own)).collect();
    Ok(Factors { a, b: Tensor::cat(&blocks?, 0)?, r: own })
}

/// The `lora_alpha` with which rank `to` has the scaling that `alpha` gives rank `from`.
pub(super) fn same_scaling(alpha: f64, from: usize, to: usize, rslora: bool) -> f64 {
    match (from == to, rslora) {
        (true, _) => alpha,
        (false, true) => alpha * (to as f64 / from as f64).sqrt(),
        (false, false) => alpha * to as f64 / from as f64,
    }
}

/// Whether every value is zero.
pub(super) fn is_zero(t: &Tensor) -> Result<bool> {
    let t = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
    Ok(t.elem_count() == 0 || t.abs()?.max(0)?.to_scalar::<f64>()? == 0.)
}
