//! A merged linear layer's factors in loralib's shapes and in PEFT's: one Linear of rank r·e whose B is
//! block-diagonal over the e enabled splits.

use crate::layers::{LayerKind, Total};
use crate::weights::pair::{is_zero, Pair};
use candle_core::{bail, Result, Tensor};

/// loralib's factors as PEFT's; `None` if their shapes do not fit.
pub(super) fn to_peft(kind: &LayerKind, Pair { a, b, r }: &Pair) -> Result<Option<Pair>> {
    let ((rows, _), (outs, ranks)) = (a.dims2()?, b.dims2()?);
    let Some(splits) = kind.splits(Total::Enabled(outs)) else { return Ok(None) };
    let enabled = splits.iter().filter(|(_, on)| *on).count();
    if ranks != *r || rows != r * enabled {
        return Ok(None);
    }
    let (mut blocks, mut row, mut at) = (vec![], 0, 0);
    for (size, on) in splits {
        blocks.push(match on {
            false => Tensor::zeros((size, rows), b.dtype(), b.device())?,
            true => {
                let block = b.narrow(0, row, size)?;
                let block = block.pad_with_zeros(1, at * r, rows - (at + 1) * r)?;
                (row, at) = (row + size, at + 1);
                block
            }
        });
    }
    Ok(Some(Pair { a: a.clone(), b: Tensor::cat(&blocks, 0)?, r: rows }))
}

/// The factors of PEFT until 0.2 as loralib's, which they are but for B, the kernel (out, r, 1) of a convolution of
/// two groups.
pub(crate) fn from_peft_02(kind: &LayerKind, a: Tensor, b: Tensor, r: usize) -> Result<Pair> {
    let (rows, (outs, own, _)) = (a.dim(0)?, b.dims3()?);
    let enabled = kind.splits(Total::Enabled(outs)).unwrap_or_default();
    let enabled = enabled.iter().filter(|(_, on)| *on).count();
    if enabled != 2 || own != r || rows != 2 * r {
        bail!(
            "lora_A {:?} and lora_B {:?} of rank {r} are not those of a {kind:?} with two enabled splits, which PEFT \
             0.2 computed right",
            a.dims(),
            b.dims()
        )
    }
    Ok(Pair { a, b: b.squeeze(2)?, r })
}

/// PEFT's factors as loralib's: the inverse of [`to_peft`].
pub(super) fn from_peft(kind: &LayerKind, a: Tensor, b: Tensor) -> Result<Pair> {
    let (out, ranks) = b.dims2()?;
    let Some(splits) = kind.splits(Total::All(out)) else {
        bail!("the splits of {kind:?} do not sum to {out} outputs")
    };
    let (mut blocks, mut row) = (vec![], 0);
    for (size, on) in splits {
        let block = b.narrow(0, row, size)?;
        row += size;
        if on {
            blocks.push(block);
        } else if !is_zero(&block)? {
            bail!("lora_B {:?} updates outputs that are not enabled in {kind:?}", b.dims())
        }
    }
    let Some(own) = ranks.checked_div(blocks.len()) else {
        bail!("no split of {kind:?} is enabled")
    };
    let mut diagonal = own * blocks.len() == ranks;
    for (i, block) in blocks.iter().enumerate() {
        diagonal = diagonal
            && is_zero(&block.narrow(1, 0, i * own)?)?
            && is_zero(&block.narrow(1, (i + 1) * own, ranks - (i + 1) * own)?)?;
    }
    if !diagonal {
        // Each split uses all ranks.
        let a = Tensor::cat(&vec![a; blocks.len()], 0)?;
        return Ok(Pair { a, b: Tensor::cat(&blocks, 0)?, r: ranks });
    }
    let blocks: Result<Vec<_>> =
        blocks.iter().enumerate().map(|(i, block)| block.narrow(1, i * own, own)).collect();
    Ok(Pair { a, b: Tensor::cat(&blocks?, 0)?, r: own })
}
