//! `y = W[ids] + (Aᵀ)[ids]·(s·B)ᵀ`: rows of a frozen table and of its low-rank update as one operation.
//! Only A's own gradient has the size of the table. The table may be quantised. With DoRA the row is scaled.

use super::backend::{Backend, LowRankTerm};
use super::custom_gradient::with_zero_grads;
use super::dora;
use super::linear::matmul::matmul;
use super::lora::LowRank;
use super::matrix::Matrix;
use super::op::{compute_dtype, if_tracked, Custom, Grads, Op};
use candle_core::{bail, DType, Device, Layout, Result, Shape, Tensor};
use std::slice;

/// `ids` (..) of any integer dtype to (.., dim), with `w` (num, dim) and an update whose A is
/// (r, num) and B (dim, r). The row of `padding`, if there is one, gets no gradient, nor does its column of A.
pub(crate) fn embedding(
    ids: &Tensor,
    w: &Matrix,
    update: Option<&LowRank>,
    padding: Option<usize>,
) -> Result<Tensor> {
    let (table, (num, dim)) = (w, w.dims2()?);
    if !ids.dtype().is_int() {
        bail!("embedding: the ids are {:?}, expected integers", ids.dtype())
    }
    let mut dims = ids.dims().to_vec();
    dims.push(dim);
    if ids.elem_count() == 0 {
        // Some backends refuse an empty lookup.
        let y = Tensor::zeros(dims, w.dtype(), &w.device())?;
        let weight = w.dense().filter(|_| update.is_none());
        let variables = update.into_iter().flat_map(LowRank::variables);
        return with_zero_grads(y, weight.into_iter().chain(variables));
    }
    // candle reads the largest value of an index dtype as padding: id 255 of a u8 or u32::MAX would
    // give zeros without an error. In i64 they are ordinary ids.
    let ids = to_i64(&ids.flatten_all()?)?;
    validate(&ids, num)?;
    let rows = |w: &Matrix| match w {
        Matrix::Dense(w) => w.contiguous()?.index_select(&ids, 0),
        Matrix::Quantized(w) => w.rows(&ids),
    };
    // 0 for the rows of padding and 1 for others, (ids, 1).
    let kept = padding.map(|padding| ids.ne(padding as i64)?.unsqueeze(1)).transpose()?;
    let out = match update {
        None => match (rows(w)?, &kept) {
            (y, Some(kept)) if y.track_op() => {
                kept.broadcast_as(y.shape())?.where_cond(&y, &y.detach())
            }
            (y, _) => Ok(y),
        },
        Some(update) => {
            let factor = update.detached().factors(w.dtype())?.remove(0);
            let u = factor.a.contiguous()?.index_select(&ids, 1)?.t()?.contiguous()?;
            let term = LowRankTerm { u, v: factor.b.t()?, rows: 0..ids.elem_count(), cols: 0..dim };
            let (w, at) = match w {
                Matrix::Dense(w) => (w.detach().contiguous()?, ids.clone()),
                // Its rows are a table in which the i-th id is i.
                w => (rows(w)?, Tensor::arange(0, ids.elem_count() as i64, ids.device())?),
            };
            let op = LoraEmbeddingOp { w, at, ids, term, scaling: update.scaling(), kept };
            let y = update.a().apply_op2(update.b(), Custom(op))?;
            match update.magnitude() {
                None => Ok(y),
                Some(magnitude) => {
                    let norms = dora::norms(&table.gemm_operand()?, update, magnitude)?;
                    dora::scaled(&y, magnitude, &norms, None)
                }
            }
        }
    };
    out?.reshape(dims)
}

/// candle cannot convert i16 and i32 on devices: they are converted on the CPU, which waits for the
/// device.
fn to_i64(ids: &Tensor) -> Result<Tensor> {
    match (ids.device(), ids.dtype()) {
        (Device::Cpu, _) | (_, DType::U8 | DType::U32 | DType::I64) => ids.to_dtype(DType::I64),
        (device, _) => ids.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_device(device),
    }
}

/// Refuses ids out of range on the CPU. On a device, reading them would wait for it: there they are left to candle,
/// whose own message on the CPU prints -1 as 18446744073709551615.
fn validate(ids: &Tensor, num: usize) -> Result<()> {
    if !ids.device().is_cpu() {
        return Ok(());
    }
    match ids.to_vec1::<i64>()?.iter().find(|id| !(0..num as i64).contains(id)) {
        Some(id) => bail!("embedding: id {id} in a table of {num} rows"),
        None => Ok(()),
    }
}

/// The operands are `A` and `B`; the table is a field, so that candle's backward gives it no gradient.
struct LoraEmbeddingOp {
    w: Tensor,
    /// The row of `w` for each id.
    at: Tensor,
    ids: Tensor,
    term: LowRankTerm,
    scaling: f64,
    /// 0 for ids whose columns of A have no gradient, (ids, 1).
    kept: Option<Tensor>,
}

impl Op<2> for LoraEmbeddingOp {
    const NAME: &'static str = "lora-embedding";

    fn forward<S: Backend>(&self, _: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        let ((w, wl), (at, al)) = (self.w.storage_and_layout(), self.at.storage_and_layout());
        let dims = (self.term.rows.len(), self.term.cols.len());
        let rows = S::of(&w)?.index_select(S::of(&at)?, wl, al, 0)?;
        Ok((rows.add_low_rank(dims, None, slice::from_ref(&self.term))?, dims.into()))
    }

    fn backward(&self, [a, b]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<Grads<2>> {
        let g = grad.to_dtype(compute_dtype(grad.dtype()))?.contiguous()?;
        let ga = if_tracked(a, || {
            let h = matmul(&g, &self.term.v.t()?)?;
            let h = match &self.kept {
                Some(kept) => h.broadcast_mul(&kept.to_dtype(h.dtype())?)?,
                None => h,
            };
            let h = h.t()?.contiguous()?;
            Tensor::zeros(a.shape(), h.dtype(), h.device())?
                .index_add(&self.ids, &h, 1)?
                .to_dtype(a.dtype())
        })?;
        let gb =
            if_tracked(b, || (matmul(&g.t()?, &self.term.u)? * self.scaling)?.to_dtype(b.dtype()))?;
        Ok([ga, gb])
    }
}
