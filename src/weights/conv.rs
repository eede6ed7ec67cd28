//! A convolution's factors in loralib's shapes and in PEFT's.
//!
//! With n spatial dimensions and g groups, and u = k^⌊n/2⌋, loralib's `B·A` is the kernel (out, in/g,
//! k..) read as (out/g·u, in·kⁿ/u): an output consists of u pieces in a row, and a row of `B·A` has g places for a
//! piece. PEFT's `A` (ranks, in, k..) has the inputs of all groups, and the outputs of group j use the j-th
//! part of the ranks. So each piece of an output (u) at each place in a row (g) needs ranks of its own in
//! each group: `A` has the columns of that place on a diagonal, and `B` has the rows, or zeros if the piece
//! is at another place. That makes g²·u·r·k ranks, and u·r·k with one group, where `B` is unchanged.
//!
//! In the other direction, any `A` of one group converts: its ranks are repeated for each piece, with one `B`
//! for all pieces. Such factors go back to the ones they came from. For several groups `A` must be zero outside of
//! its group's inputs, which PEFT's own never is: an update from all inputs to all outputs has no grouped
//! kernel.

use super::pair::{is_zero, Pair};
use candle_core::{bail, Result, Tensor};

/// The largest factor that is created, 4 GiB of F32: many groups need many zeros.
const MOST_VALUES: usize = 1 << 30;

/// The ranks of a convolution of `own` ranks in PEFT's shapes as loralib's r: its factors are copies for u pieces.
pub(crate) fn rank_of_copies(n: usize, k: usize, own: usize) -> usize {
    (k.saturating_pow(n as u32 / 2) * own).div_ceil(k.max(1))
}

/// The rank in PEFT's shapes, if [`from_peft`] made these factors of B (out, `own`, 1..) as copies.
pub(crate) fn rank_in_peft(n: usize, groups: usize, factors: &Pair, own: usize) -> Option<usize> {
    let rows = factors.a.dim(0).ok()?;
    let k = rows.checked_div(factors.r)?;
    let is_exact = rows * k.saturating_pow(n as u32 / 2) == own;
    (groups == 1 && !is_exact).then_some(own)
}

/// loralib's factors as PEFT's, for n spatial dimensions; `None` if their shapes do not fit. `own` is their
/// [rank in PEFT](rank_in_peft), if they are copies.
pub(crate) fn to_peft(
    n: usize,
    groups: usize,
    factors: &Pair,
    own: Option<usize>,
) -> Result<Option<Pair>> {
    let original = own.filter(|_| groups == 1).map(|own| original(n, factors, own));
    match original.transpose()?.flatten() {
        None => expanded(n, groups, factors),
        original => Ok(original),
    }
}

/// The factors in PEFT's shapes, of rank `own`, that [`from_peft`] makes these of, if there are any.
fn original(n: usize, Pair { a, b, r }: &Pair, own: usize) -> Result<Option<Pair>> {
    let ((rows, columns), (outs, ranks)) = (a.dims2()?, b.dims2()?);
    let k = rows.checked_div(*r).unwrap_or(0);
    let (u, width) = (k.saturating_pow(n as u32 / 2), k.saturating_pow(n.div_ceil(2) as u32));
    let fits = k > 0 && k * r == rows && ranks == rows && outs.checked_rem(u) == Some(0);
    let is_rank = own > 0 && own.saturating_mul(u) <= rows && rank_of_copies(n, k, own) == *r;
    if !(fits && is_rank) || columns.checked_rem(width) != Some(0) {
        return Ok(None);
    }
    let kernel = [&[own, columns / width][..], &[k; 3][..n]].concat();
    let small_a = a.narrow(0, 0, u * own)?.reshape((u, own, columns))?;
    let small_a = small_a.transpose(0, 1)?.reshape(kernel)?;
    let small_b = b.reshape((outs / u, u, rows))?.narrow(1, 0, 1)?.narrow(2, 0, own)?;
    let small_b = small_b.reshape([&[outs / u, own][..], &[1; 3][..n]].concat())?;
    let again = from_peft(1, small_a.clone(), small_b.clone())?;
    let is_same = again.r == *r && is_zero(&(again.a - a)?)? && is_zero(&(again.b - b)?)?;
    Ok(is_same.then_some(Pair { a: small_a, b: small_b, r: own }))
}

/// Pair of any values in PEFT's shapes.
fn expanded(n: usize, groups: usize, factors: &Pair) -> Result<Option<Pair>> {
    let Pair { a, b, r } = factors;
    let ((rows, columns), (outs, ranks)) = (a.dims2()?, b.dims2()?);
    let k = rows.checked_div(*r).unwrap_or(0);
    let (u, width) = (k.saturating_pow(n as u32 / 2), k.saturating_pow(n.div_ceil(2) as u32));
    let fits = k > 0 && k * r == rows && ranks == rows && outs.checked_rem(u) == Some(0);
    let per_group = columns.checked_div(groups.saturating_mul(width)).unwrap_or(0);
    if !fits || per_group * groups * width != columns {
        return Ok(None);
    }
    let own = groups.saturating_mul(u).saturating_mul(rows);
    let all = own.saturating_mul(groups);
    if all.saturating_mul(columns).saturating_mul(u) > MOST_VALUES {
        bail!(
            "its update of {groups} groups has {all} ranks in PEFT's format, too many to write: \
             merge it into the base instead"
        )
    }
    let piece = per_group * width;
    let a = a.reshape((rows, groups, piece))?.transpose(0, 1)?.reshape((groups * rows, piece))?;
    let kernel = [&[own, per_group][..], &[k; 3][..n]].concat();
    let a = diagonal(&diagonal(&a, u, 0)?.reshape(kernel)?, groups, 0)?;
    let b_shape = [&[outs / u * groups, own][..], &[1; 3][..n]].concat();
    let b = diagonal(&b.unsqueeze(1)?, groups, 1)?.reshape(b_shape)?;
    Ok(Some(Pair { a, b, r: all }))
}

/// PEFT's factors (ranks, in, k..) and (out, ranks/groups, 1..) as loralib's: the inverse of [`to_peft`].
pub(crate) fn from_peft(groups: usize, a: Tensor, b: Tensor) -> Result<Pair> {
    let (inputs, n, k) = (a.dim(1)?, a.rank() - 2, a.dims()[2]);
    let (out, own) = (b.dim(0)?, b.dim(1)?);
    if k == 0 || inputs % groups != 0 || out % groups != 0 {
        bail!(
            "{groups} groups and a kernel of {k} do not fit the shapes {:?} and {:?}",
            a.dims(),
            b.dims()
        )
    }
    let u = k.saturating_pow(n as u32 / 2);
    let columns = a.elem_count() / a.dim(0)? / u;
    let rows = own / u / groups;
    if rows > 0 && rows.is_multiple_of(k) && rows * u * groups == own {
        let (piece, outs) = (columns / groups, out / groups * u);
        let first = a.narrow(0, 0, groups * rows)?.narrow(1, 0, inputs / groups)?;
        let first = first.reshape((groups, rows, u * piece))?.narrow(2, 0, piece)?;
        let found = Pair {
            a: first.transpose(0, 1)?.reshape((rows, columns))?,
            b: b.reshape((outs, groups, groups * rows))?
                .narrow(1, 0, 1)?
                .narrow(2, 0, rows)?
                .reshape((outs, rows))?,
            r: rows / k,
        };
        if let Some(again) = expanded(n, groups, &found)? {
            if is_zero(&(again.a - &a)?)? && is_zero(&(again.b - &b)?)? {
                return Ok(found);
            }
        }
    }
    if groups > 1 {
        bail!(
            "this lora_A {:?} updates every output from the inputs of all {groups} groups, but the \
             kernel of a grouped convolution has only those of its own group",
            a.dims()
        )
    }
    // Each piece of an output uses all ranks: B has the factor on a diagonal.
    let r = rank_of_copies(n, k, own);
    let spare = r * k - u * own;
    let a = a.reshape((own, u, columns))?.transpose(0, 1)?.reshape((u * own, columns))?;
    let b = diagonal(&b.reshape((out, 1, own))?, u, 1)?.reshape((out * u, u * own))?;
    Ok(Pair { a: a.pad_with_zeros(0, 0, spare)?, b: b.pad_with_zeros(1, 0, spare)?, r })
}

/// Copies of `t` on the diagonal of the dimensions `d` and `d + 1`.
fn diagonal(t: &Tensor, times: usize, d: usize) -> Result<Tensor> {
    let size = t.dim(d + 1)?;
    let block = |i| t.pad_with_zeros(d + 1, i * size, (times - 1 - i) * size);
    Tensor::cat(&(0..times).map(block).collect::<Result<Vec<_>>>()?, d)
}
