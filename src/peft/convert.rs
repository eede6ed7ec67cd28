//! loralib's factors as PEFT's, and back, with the same product.
//!
//! With n spatial dimensions a kernel (out, in, k..) is, row by row, the matrix (out·u, in·kⁿ/u)
//! with u = k^⌊n/2⌋, and that is loralib's `B·A`: `A` (r·k, in·kⁿ/u), `B` (out·u, r·k). PEFT's is
//! `B` (out, ranks) times `A` (ranks, in·kⁿ). So each of the u rows of an output becomes ranks of
//! its own: A u times along a diagonal, and B as it is, read as (out, u·r·k).

use super::config::{Kind, Total};
use candle_core::{bail, DType, Device, Result, Tensor};

/// The factors of a layer and its rank.
#[derive(Debug)]
pub(super) struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    pub r: usize,
}

/// loralib's factors of rank `r` as PEFT's.
pub(super) fn to_peft(kind: &Kind, Factors { a, b, r }: Factors) -> Result<Factors> {
    let ((rows, columns), (outs, ranks)) = (a.dims2()?, b.dims2()?);
    let misfit = |kind: &dyn std::fmt::Debug| -> Result<Factors> {
        bail!(
            "lora_A {:?} and lora_B {:?} of rank {r} do not make a {kind:?}: say in the \
             configuration what this layer is",
            a.dims(),
            b.dims()
        )
    };
    if let Some(n) = kind.spatial() {
        let Some(k) = rows.checked_div(r).filter(|k| *k > 0 && k * r == rows) else {
            return misfit(kind);
        };
        let (u, width) = (k.pow(n as u32 / 2), k.pow(n.div_ceil(2) as u32));
        if ranks != rows || outs % u != 0 || columns % width != 0 {
            return misfit(kind);
        }
        let kernel = [&[u * rows, columns / width][..], &[k; 3][..n]].concat();
        let b_shape = [&[outs / u, u * rows][..], &[1; 3][..n]].concat();
        let blocks: Result<Vec<_>> =
            (0..u).map(|i| a.pad_with_zeros(1, i * columns, (u - 1 - i) * columns)).collect();
        let a = Tensor::cat(&blocks?, 0)?.reshape(kernel)?;
        return Ok(Factors { a, b: b.reshape(b_shape)?, r: u * rows });
    }
    if matches!(kind, Kind::Linear | Kind::Embedding) {
        return match rows == r && ranks == r {
            true => Ok(Factors { a, b, r }),
            false => misfit(kind),
        };
    }
    let Some(splits) = kind.splits(Total::Enabled(outs)) else { return misfit(kind) };
    let parts = splits.iter().filter(|(_, on)| *on).count();
    if ranks != r || rows != r * parts {
        return misfit(kind);
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
    Ok(Factors { a, b: Tensor::cat(&blocks, 0)?, r: rows })
}

/// PEFT's factors as loralib's. What [`to_peft`] made comes back as it was.
pub(super) fn from_peft(kind: &Kind, a: Tensor, b: Tensor) -> Result<Factors> {
    let fits = |n: usize| {
        let (a, b) = (a.dims(), b.dims());
        let kernel = a.len() == n + 2 && b.len() == n + 2 && a[2..].iter().all(|k| *k == a[2]);
        kernel && a[0] == b[1] && a[0] > 0 && b[2..].iter().all(|one| *one == 1)
    };
    if !fits(kind.spatial().unwrap_or(0)) {
        bail!(
            "lora_A {:?} and lora_B {:?} are not the factors of a {kind:?} in one group, with a \
             kernel of one size",
            a.dims(),
            b.dims()
        )
    }
    match kind {
        Kind::Linear | Kind::Embedding => Ok(Factors { r: a.dim(0)?, a, b }),
        Kind::Conv1d | Kind::Conv2d | Kind::Conv3d => conv_from_peft(a, b),
        Kind::MergedLinear(_) | Kind::Splits(_) => merged_from_peft(kind, a, b),
    }
}

fn conv_from_peft(a: Tensor, b: Tensor) -> Result<Factors> {
    let (ranks, n, k, out) = (a.dim(0)?, a.rank() - 2, a.dims()[2], b.dim(0)?);
    if k == 0 {
        bail!("a kernel without elements")
    }
    let u = k.pow(n as u32 / 2);
    let columns = a.elem_count() / ranks / u;
    let (a, b) = (a.reshape((ranks, u, columns))?, b.reshape((out, ranks))?);
    if ranks % (u * k) == 0 {
        let own = ranks / u;
        let first = a.narrow(0, 0, own)?.narrow(1, 0, 1)?.reshape((own, columns))?;
        let blocks: Result<Vec<_>> =
            (0..u).map(|i| first.pad_with_zeros(1, i * columns, (u - 1 - i) * columns)).collect();
        let repeated = Tensor::cat(&blocks?, 0)?.reshape(a.shape())?;
        if is_zero(&(repeated - &a)?)? {
            return Ok(Factors { a: first, b: b.reshape((out * u, own))?, r: own / k });
        }
    }
    let r = (u * ranks).div_ceil(k);
    let spare = r * k - u * ranks;
    let a = a.transpose(0, 1)?.reshape((u * ranks, columns))?.pad_with_zeros(0, 0, spare)?;
    let blocks: Result<Vec<_>> =
        (0..u).map(|i| b.pad_with_zeros(1, i * ranks, (u - 1 - i) * ranks)).collect();
    let b = Tensor::stack(&blocks?, 1)?.reshape((out * u, u * ranks))?;
    Ok(Factors { a, b: b.pad_with_zeros(1, 0, spare)?, r })
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
fn is_zero(t: &Tensor) -> Result<bool> {
    let t = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
    Ok(t.elem_count() == 0 || t.abs()?.max(0)?.to_scalar::<f64>()? == 0.)
}
