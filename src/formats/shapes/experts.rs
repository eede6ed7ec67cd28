//! The factors of a parameter in this crate's shapes, A (experts, r, in) and B (experts, out, r), and in PEFT's: A
//! (experts·r, in) with an expert's ranks in a row, and B (out, r·experts) with those of all experts in turn. A
//! parameter without experts counts as one.

use crate::weights::pair::Pair;
use candle_core::{Result, Tensor};

/// PEFT's factors; `None` if the shapes do not fit.
pub(super) fn to_peft(Pair { a, b, r }: &Pair) -> Result<Option<Pair>> {
    let ((experts, rows, _), (of_b, _, ranks)) = (a.dims3()?, b.dims3()?);
    if (experts, rows, ranks) != (of_b, *r, *r) {
        return Ok(None);
    }
    let b = b.permute((1, 2, 0))?.flatten_from(1)?;
    Ok(Some(Pair { a: a.flatten_to(1)?, b, r: *r }))
}

/// This crate's factors of rank `r`; `None` if the shapes do not fit.
pub(crate) fn from_peft(a: &Tensor, b: &Tensor, r: usize) -> Result<Option<Pair>> {
    let ((ranks, inputs), (outs, of_b)) = (a.dims2()?, b.dims2()?);
    if ranks == 0 || ranks % r != 0 || ranks != of_b {
        return Ok(None);
    }
    let experts = ranks / r;
    let b = b.reshape((outs, r, experts))?.permute((2, 0, 1))?.contiguous()?;
    Ok(Some(Pair { a: a.reshape((experts, r, inputs))?, b, r }))
}
