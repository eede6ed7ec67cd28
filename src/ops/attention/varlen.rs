//! Attention within each of several sequences that lie one after another.

use super::op::AttentionOp;
use super::scores::Scores;
use crate::ops::custom_gradient::with_zero_grads;
use crate::ops::op::{operand, run, Fused, Grads, Operand};
use crate::ops::place::is_fused;
use candle_core::{bail, CpuStorage, DType, Device, Result, Shape, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// `q` (all queries, heads, d), `k` and `v` (all keys, kv_heads, d) to (all queries, heads, d). `lens` are, for queries
/// and for keys, where each sequence begins and where the last one ends, and the length of the longest. The last query of
/// a sequence is beside its last key.
pub(crate) fn attention_varlen(
    qkv: [&Tensor; 3],
    lens: [(&Tensor, usize); 2],
    scores: Scores,
) -> Result<Tensor> {
    for x in qkv {
        x.dims3()?;
    }
    let [q, k, v] = qkv.map(|x| x.unsqueeze(0));
    let qkv = [q?, k?, v?];
    let [q, k, v] = qkv.each_ref();
    // Of all sequences together, for its checks.
    let scores = AttentionOp::new([q, k, v], scores)?.scores;
    if q.elem_count() == 0 {
        return with_zero_grads(q.zeros_like()?, [q, k, v])?.squeeze(0);
    }
    let (all_queries, all_keys) = (q.dim(1)?, k.dim(1)?);
    let [queries, keys] = lens.map(|(lens, _)| lens);
    let sequences = ranges(queries, all_queries)?.zip(ranges(keys, all_keys)?);
    let sequences: Vec<_> = sequences.collect();
    if queries.dims() != keys.dims() {
        let (queries, keys) = (queries.dims(), keys.dims());
        bail!("attention: the sequences' lengths are {queries:?} for queries and {keys:?} for keys")
    }
    for (queries, keys) in &sequences {
        let [(_, most_queries), (_, most_keys)] = lens;
        if queries.len() > most_queries || keys.len() > most_keys {
            bail!(
                "attention: a sequence has {} queries and {} keys, expected at most {most_queries} and {most_keys}",
                queries.len(),
                keys.len()
            )
        }
    }
    let op = VarlenOp { sequences, scores };
    run(op, qkv.each_ref())?.squeeze(0)
}

/// The sequences whose bounds are `lens`.
fn ranges(lens: &Tensor, all: usize) -> Result<impl Iterator<Item = Range<usize>>> {
    if !lens.dtype().is_int() {
        bail!("attention: the sequences' lengths are {:?}, expected integers", lens.dtype())
    }
    let lens = lens.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let ends = lens.first() == Some(&0) && lens.last() == Some(&(all as i64));
    if lens.len() < 2 || !ends || !lens.is_sorted() {
        bail!("attention: the sequences' bounds are {lens:?}, expected from 0 to {all}, each not less than the one before")
    }
    let pairs: Vec<_> = lens.windows(2).map(|pair| pair[0] as usize..pair[1] as usize).collect();
    Ok(pairs.into_iter())
}

/// The arguments have a batch of one.
struct VarlenOp {
    /// The queries and keys of each.
    sequences: Vec<(Range<usize>, Range<usize>)>,
    scores: Scores,
}

impl VarlenOp {
    /// Each sequence with queries, as an operation and its arguments.
    fn parts<'a>(&'a self, qkv: [&'a Tensor; 3]) -> impl Iterator<Item = Result<Part<'a>>> {
        let with_queries = self.sequences.iter().filter(|(queries, _)| !queries.is_empty());
        with_queries.map(move |(queries, keys)| {
            let narrow = |x: &Tensor, rows: &Range<usize>| x.narrow(1, rows.start, rows.len());
            let qkv = [narrow(qkv[0], queries)?, narrow(qkv[1], keys)?, narrow(qkv[2], keys)?];
            let mut scores = self.scores.clone();
            scores.window.offset = keys.len() as i64 - queries.len() as i64;
            Ok(Part { queries, keys, op: AttentionOp::new(qkv.each_ref(), scores)?, qkv })
        })
    }
}

/// One of the sequences.
struct Part<'a> {
    queries: &'a Range<usize>,
    keys: &'a Range<usize>,
    op: AttentionOp,
    qkv: [Tensor; 3],
}

/// Runs `f` for each part: on the CPU in all threads, since a short sequence is work for one.
fn each<'a>(
    parts: &'a [Part<'a>],
    device: &Device,
    f: impl Fn(&'a Part<'a>) -> Result<()> + Send + Sync,
) -> Result<()> {
    match is_fused(device) {
        true => parts.par_iter().try_for_each(f),
        false => parts.iter().try_for_each(f),
    }
}

impl Fused<3> for VarlenOp {
    const NAME: &'static str = "attention-varlen";

    /// Each sequence's attention chooses.
    fn fused_dtype(&self, _: [&Tensor; 3]) -> Option<DType> {
        None
    }

    fn forward(&self, _: [Operand; 3]) -> Result<(CpuStorage, Shape)> {
        bail!("attention: sequences are computed one by one")
    }

    fn backward(&self, _: [&Tensor; 3], _: &Tensor, _: &Tensor) -> Result<Grads<3>> {
        bail!("attention: sequences are computed one by one")
    }

    fn composed(&self, qkv: [&Tensor; 3]) -> Result<Tensor> {
        let y = qkv[0].zeros_like()?;
        let parts: Vec<_> = self.parts(qkv).collect::<Result<_>>()?;
        each(&parts, y.device(), |part| {
            let output = run(part.op.clone(), part.qkv.each_ref())?;
            y.slice_set(&output, 1, part.queries.start)
        })?;
        Ok(y)
    }

    fn composed_backward(&self, qkv: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<Grads<3>> {
        let detached = qkv.map(Tensor::detach);
        let grads = detached.each_ref().map(Tensor::zeros_like);
        let [gq, gk, gv] = grads;
        let grads = [gq?, gk?, gv?];
        let parts: Vec<_> = self.parts(detached.each_ref()).collect::<Result<_>>()?;
        each(&parts, grad.device(), |part| {
            let Part { queries, keys, op, qkv } = part;
            let of_queries =
                |t: &Tensor| operand(&t.narrow(1, queries.start, queries.len())?, t.dtype());
            let parts = op.grads(qkv.each_ref(), &of_queries(grad)?)?;
            for ((grad, part), rows) in grads.iter().zip(parts).zip([*queries, *keys, *keys]) {
                grad.slice_set(&operand(&part, grad.dtype())?, 1, rows.start)?;
            }
            Ok(())
        })?;
        Ok(std::array::from_fn(|i| qkv[i].track_op().then(|| grads[i].clone())))
    }
}
