//! Attention as an operation, fused on the CPU.

use super::blocks;
use super::scores::Scores;
use crate::ops::backend::Backend;
use crate::ops::cpu::attention::{backward, forward, Bias, Heads, MaskRows};
use crate::ops::cpu::{f32_slices, FUSED_ATTENTION};
use crate::ops::custom_gradient::with_zero_grads;
use crate::ops::op::{operand, run, Fused, Grads, Operand};
use crate::ops::place::is_fused;
use candle_core::{bail, CpuStorage, DType, Result, Shape, Tensor};

/// `q` (batch, queries, heads, d), `k` and `v` (batch, keys, kv_heads, d) to (batch, queries, heads, d).
/// kv_heads divides heads. A query that the window leaves no key gives zeros.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scores: Scores) -> Result<Tensor> {
    let op = AttentionOp::new([q, k, v], scores)?;
    if q.elem_count() == 0 {
        return with_zero_grads(q.zeros_like()?, [q, k, v]);
    }
    match op.scores.mask.as_ref().is_some_and(Tensor::track_op) {
        // candle's operations have three operands at most.
        true => blocks::whole(&op.heads, &op.scores, [q, k, v]),
        false => run(op, [q, k, v]),
    }
}

#[derive(Clone)]
pub(super) struct AttentionOp {
    heads: Heads,
    pub scores: Scores,
}

impl AttentionOp {
    pub fn new([q, k, v]: [&Tensor; 3], scores: Scores) -> Result<Self> {
        let ((batch, queries, count, d), (kb, keys, kv_count, kd)) = (q.dims4()?, k.dims4()?);
        let fits = kb == batch && kd == d && v.dims() == k.dims();
        if !fits || kv_count == 0 || count % kv_count != 0 {
            let (q, k, v) = (q.dims(), k.dims(), v.dims());
            bail!("attention: q is {q:?}, k {k:?} and v {v:?}")
        }
        if !q.dtype().is_float() || k.dtype() != q.dtype() || v.dtype() != q.dtype() {
            let (q, k, v) = (q.dtype(), k.dtype(), v.dtype());
            bail!("attention: q is {q:?}, k {k:?} and v {v:?}, expected one dtype of floats")
        }
        if let Some(mask) = scores.mask.as_ref().filter(|mask| !mask.dtype().is_float()) {
            bail!("attention: the mask is {:?}, expected floats, which are added", mask.dtype())
        }
        if let Some(slopes) = &scores.slopes {
            if slopes.dims() != [count] {
                bail!("attention: the ALiBi slopes are {:?}, expected [{count}]", slopes.dims())
            }
            if slopes.track_op() {
                bail!("attention: the ALiBi slopes lead to a variable, and have no gradient")
            }
        }
        let softcap = scores.softcap.filter(|cap| cap.is_finite());
        let scores = Scores { softcap, ..scores };
        Ok(Self { heads: Heads { batch, queries, keys, count, kv_count, d }, scores })
    }

    /// The gradients of detached arguments, from that of the output.
    pub fn grads(&self, qkv: [&Tensor; 3], g: &Tensor) -> Result<[Tensor; 3]> {
        match self.fused_dtype(qkv).filter(|_| is_fused(g.device())) {
            None => blocks::backward(&self.heads, &self.scores, qkv, g),
            Some(dtype) => {
                let [q, k, v] = qkv.map(|x| operand(x, dtype));
                let qkvg = [&q?, &k?, &v?, &operand(g, dtype)?];
                self.with_bias(|bias| backward(&self.heads, qkvg, bias))
            }
        }
    }

    fn with_bias<R>(&self, f: impl FnOnce(&Bias) -> Result<R>) -> Result<R> {
        let Scores { scale, softcap, window, slopes, mask } = &self.scores;
        let Heads { batch, count, queries, keys, .. } = self.heads;
        let (scale, softcap) = (*scale as f32, softcap.map(|cap| cap as f32));
        let slopes = slopes.as_ref().map(|slopes| slopes.to_dtype(DType::F32)?.to_vec1());
        let slopes = slopes.transpose()?;
        let slopes = slopes.as_deref();
        let bias = Bias { scale, softcap, window: *window, slopes, mask: None };
        let Some(mask) = mask else { return f(&bias) };
        let mask = operand(mask, DType::F32)?.broadcast_as((batch, count, queries, keys))?;
        let (storage, layout) = mask.storage_and_layout();
        let values = &CpuStorage::of(&storage)?.as_slice::<f32>()?[layout.start_offset()..];
        // A contiguous mask has 1, or 0 where it is the same for all keys, as the last stride.
        let [of_b, of_h, of_i, of_j] = [0, 1, 2, 3].map(|dim| layout.stride()[dim]);
        let same = of_j == 0 || keys == 1;
        let mask = Some(MaskRows { values, strides: [of_b, of_h, of_i], same });
        f(&Bias { mask, ..bias })
    }
}

impl Fused<3> for AttentionOp {
    const NAME: &'static str = "attention";

    fn fused_dtype(&self, qkv: [&Tensor; 3]) -> Option<DType> {
        let half_or_f32 = |x: &&Tensor| matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16);
        let fused = FUSED_ATTENTION && self.heads.keys > 0 && qkv.iter().all(half_or_f32);
        fused.then_some(DType::F32)
    }

    fn forward(&self, qkv: [Operand; 3]) -> Result<(CpuStorage, Shape)> {
        let shape = qkv[0].1.shape().clone();
        let qkv = f32_slices(qkv)?;
        self.with_bias(|bias| Ok((CpuStorage::F32(forward(&self.heads, qkv, bias)), shape)))
    }

    fn backward(&self, qkv: [&Tensor; 3], y: &Tensor, g: &Tensor) -> Result<Grads<3>> {
        self.composed_backward(qkv, y, g)
    }

    fn composed(&self, qkv: [&Tensor; 3]) -> Result<Tensor> {
        blocks::forward(&self.heads, &self.scores, qkv)
    }

    fn composed_backward(&self, qkv: [&Tensor; 3], _: &Tensor, g: &Tensor) -> Result<Grads<3>> {
        let grads = self.grads(qkv.map(Tensor::detach).each_ref(), g)?;
        Ok(std::array::from_fn(|i| qkv[i].track_op().then(|| grads[i].clone())))
    }
}

#[cfg(test)]
mod tests {
    //! Each implementation against all scores at once in F64. Blocks are small here: each input has several.

    use super::*;
    use crate::ops::attention::varlen::attention_varlen;
    use crate::ops::window::Window;
    use crate::random::normal;
    use candle_core::{Device, Var};

    /// The output and the gradients of q, k and v.
    fn results(
        x: &[Tensor; 3],
        g: &Tensor,
        f: impl Fn([&Tensor; 3]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let vars = x.each_ref().map(Var::from_tensor);
        let [q, k, v] = vars;
        let vars = [q?, k?, v?];
        let y = f([&vars[0], &vars[1], &vars[2]])?;
        let grads = (&y * g)?.sum_all()?.backward()?;
        let grads = vars.iter().map(|var| grads.get(var).cloned().unwrap());
        Ok([y.clone()].into_iter().chain(grads).collect())
    }

    fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
        (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar()
    }

    /// All scores at once; a query that sees no key gives zeros.
    fn reference([q, k, v]: [&Tensor; 3], scores: &Scores) -> Result<Tensor> {
        let Heads { batch, queries, keys, count, kv_count, d } =
            AttentionOp::new([q, k, v], scores.clone())?.heads;
        let by_head = |x: &Tensor| {
            let x = x.transpose(1, 2)?.contiguous()?;
            let tokens = x.dim(2)?;
            let x = x.unsqueeze(2)?.expand((batch, kv_count, count / kv_count, tokens, d))?;
            x.reshape((batch, count, tokens, d))
        };
        let q = q.transpose(1, 2)?.contiguous()?;
        let mut s = (q.matmul(&by_head(k)?.t()?)? * scores.scale)?;
        if let Some(cap) = scores.softcap {
            s = ((s / cap)?.tanh()? * cap)?;
        }
        if let Some(mask) = &scores.mask {
            s = s.broadcast_add(mask)?;
        }
        let slopes = match &scores.slopes {
            Some(slopes) => slopes.to_vec1::<f32>()?,
            None => vec![0.; count],
        };
        let Window { offset, left, right } = scores.window;
        let (mut bias, mut seeing) = (vec![], vec![]);
        for slope in slopes {
            for i in 0..queries {
                let mut sees = false;
                for j in 0..keys {
                    let apart = j as i64 - (i as i64 + offset);
                    let seen = left.is_none_or(|left| apart >= -(left as i64))
                        && right.is_none_or(|right| apart <= right as i64);
                    bias.push(if seen { -f64::from(slope) * apart.abs() as f64 } else { -1e9 });
                    sees |= seen;
                }
                seeing.push(f64::from(u8::from(sees)));
            }
        }
        let bias = Tensor::from_vec(bias, (count, queries, keys), &Device::Cpu)?;
        let p = candle_nn::ops::softmax(&s.broadcast_add(&bias)?, 3)?;
        let seeing = Tensor::from_vec(seeing, (count, queries, 1), &Device::Cpu)?;
        p.broadcast_mul(&seeing)?.matmul(&by_head(v)?)?.transpose(1, 2)?.contiguous()
    }

    /// Every pattern of scores for queries and keys whose last ones are beside each other.
    fn patterns(heads: usize, queries: usize, keys: usize) -> Result<Vec<Scores>> {
        let offset = keys as i64 - queries as i64;
        let bounds = [
            (None, None),
            (None, Some(0)),
            (Some(3), Some(0)),
            (Some(2), Some(1)),
            (Some(70), None),
        ];
        let windows = bounds.map(|(left, right)| Window { offset, left, right });
        let mut all = vec![];
        for window in windows {
            for (softcap, sloped, masked) in [
                (None, false, false),
                (Some(1.5), false, false),
                (None, true, false),
                (Some(2.), true, true),
            ] {
                let slopes =
                    sloped.then(|| Tensor::arange(0f32, heads as f32, &Device::Cpu)? * 0.1);
                let mask = masked.then(|| normal((2, 1, queries, keys)));
                let (slopes, mask) = (slopes.transpose()?, mask.transpose()?);
                all.push(Scores { scale: 0.7, softcap, window, slopes, mask });
            }
        }
        Ok(all)
    }

    #[test]
    fn blocks_have_the_values_and_gradients_of_all_scores_at_once() -> Result<()> {
        let sizes = [(4, 2, 37, 37), (2, 2, 5, 40), (3, 1, 40, 33), (4, 2, 1, 40), (5, 1, 1, 2)];
        for (heads, kv_heads, queries, keys) in sizes {
            let dims = [(2, queries, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)];
            let [q, k, v] = dims.map(normal);
            let (x, g) = ([q?, k?, v?], normal(dims[0])?);
            for scores in patterns(heads, queries, keys)? {
                let op = |x: [&Tensor; 3]| AttentionOp::new(x, scores.clone());
                let expected = results(&x, &g, |x| reference(x, &scores))?;
                for (dtype, tolerance) in
                    [(DType::F64, 1e-12), (DType::F32, 2e-5), (DType::BF16, 0.15)]
                {
                    let in_dtype = |t: &Tensor| t.to_dtype(dtype);
                    let [q, k, v] = x.each_ref().map(in_dtype);
                    let (x, g) = ([q?, k?, v?], in_dtype(&g)?);
                    let fused = results(&x, &g, |x| run(op(x)?, x))?;
                    let x = x.each_ref();
                    let y = op(x)?.composed(x)?;
                    let AttentionOp { heads, scores } = &op(x)?;
                    let grads = blocks::backward(heads, scores, x, &g)?;
                    let composed: Vec<_> = [y].into_iter().chain(grads).collect();
                    for (i, expected) in expected.iter().enumerate() {
                        for (name, found) in [("fused", &fused[i]), ("composed", &composed[i])] {
                            let apart = apart(&found.contiguous()?, expected)?;
                            assert!(
                                apart < tolerance,
                                "{name} {dtype:?} {i}: {apart:e}, {scores:?}"
                            );
                        }
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn sequences_are_computed_apart() -> Result<()> {
        let (heads, kv_heads, all) = (4, 2, 23);
        let bounds = [[0u32, 9, 9, 14, 23], [0, 8, 10, 20, 23]];
        let x = [heads, kv_heads, kv_heads].map(|heads| normal((all, heads, 8)));
        let [q, k, v] = x;
        let (x, g) = ([q?, k?, v?], normal((all, heads, 8))?);
        for scores in patterns(heads, 1, 1)?.into_iter().filter(|scores| scores.mask.is_none()) {
            let lens = bounds.map(|bounds| Tensor::new(&bounds, &Device::Cpu));
            let [queries, keys] = lens;
            let lens = [(&queries?, 9), (&keys?, 10)];
            let expected = results(&x, &g, |x| {
                let rows = |i: usize| {
                    bounds[i]
                        .windows(2)
                        .map(|pair| (pair[0] as usize, (pair[1] - pair[0]) as usize))
                };
                let parts = rows(0).zip(rows(1)).filter(|((_, queries), _)| *queries > 0);
                let parts = parts.map(|(queries, keys)| {
                    let part = |x: &Tensor, (from, len)| x.narrow(0, from, len)?.unsqueeze(0);
                    let mut scores = scores.clone();
                    scores.window.offset = keys.1 as i64 - queries.1 as i64;
                    attention(
                        &part(x[0], queries)?,
                        &part(x[1], keys)?,
                        &part(x[2], keys)?,
                        scores,
                    )?
                    .squeeze(0)
                });
                Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
            })?;
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
                let [q, k, v] = x.each_ref().map(|x| x.to_dtype(dtype));
                let found = results(&[q?, k?, v?], &g.to_dtype(dtype)?, |x| {
                    attention_varlen(x, lens, scores.clone())
                })?;
                for (found, expected) in found.iter().zip(&expected) {
                    let apart = apart(found, expected)?;
                    assert!(apart < tolerance, "{dtype:?}: {apart:e}, {scores:?}");
                }
            }
            for (queries, keys, most) in [
                (vec![0u32, 23], vec![0u32, 22], 23),
                (vec![1, 23], vec![0, 23], 23),
                (vec![0, 9, 8, 23], vec![0, 8, 10, 23], 23),
                (vec![0, 9, 23], vec![0, 23], 23),
                (vec![0, 23], vec![0, 23], 22),
            ] {
                let [queries, keys] = [queries, keys].map(|lens| Tensor::new(lens, &Device::Cpu));
                let lens = [(&queries?, most), (&keys?, 23)];
                let error = attention_varlen(x.each_ref(), lens, scores.clone()).unwrap_err();
                assert!(error.to_string().contains("attention: "), "{error}");
            }
        }
        Ok(())
    }

    /// The exact gradients of q and k are zero. In half precision the sum over a row must cancel too.
    #[test]
    fn a_query_with_one_key_moves_neither_of_them() -> Result<()> {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let new = |dims: (usize, usize, usize, usize)| normal(dims)?.to_dtype(dtype);
            let (q, k, v) = (new((1, 9, 2, 8))?, new((1, 1, 2, 8))?, new((1, 1, 2, 8))?);
            let g = new((1, 9, 2, 8))?;
            let op = AttentionOp::new([&q, &k, &v], Scores { scale: 0.4, ..Scores::default() })?;
            let composed = blocks::backward(&op.heads, &op.scores, [&q, &k, &v], &g)?;
            for [gq, gk, _] in [op.grads([&q, &k, &v], &g)?, composed] {
                for grad in [gq, gk] {
                    let most = grad.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                    assert!(most < 1e-6, "{dtype:?}: {most}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn scores_beyond_half_precision_are_finite() -> Result<()> {
        let large = Tensor::full(40f32, (1, 2, 1, 64), &Device::Cpu)?.to_dtype(DType::F16)?;
        let v = normal((1, 2, 1, 64))?.to_dtype(DType::F16)?;
        let op = AttentionOp::new([&large, &large, &v], Scores { scale: 1., ..Scores::default() })?;
        let y = op.composed([&large, &large, &v])?;
        assert!(apart(&y.narrow(1, 0, 1)?, &v.mean_keepdim(1)?)? < 1e-3);
        Ok(())
    }

    #[test]
    fn a_softcap_of_any_size_keeps_its_digits() -> Result<()> {
        let x = [normal((1, 7, 2, 8))?, normal((1, 7, 2, 8))?, normal((1, 7, 2, 8))?];
        for cap in [1e-2, 0.5, 30., 1e4, 1e8, f64::INFINITY] {
            let scores = Scores { scale: 1., softcap: Some(cap), ..Scores::default() };
            let finite = Scores { softcap: Some(cap.min(1e12)), ..scores.clone() };
            let expected = reference(x.each_ref(), &finite)?;
            let [q, k, v] = x.each_ref().map(|x| x.to_dtype(DType::F32));
            let y = attention(&q?, &k?, &v?, scores)?;
            assert!(apart(&y, &expected)? < 2e-6, "{cap}");
        }
        Ok(())
    }

    #[test]
    fn a_mask_of_any_shape_is_added() -> Result<()> {
        let (q, k) = (normal((2, 5, 4, 8))?, normal((2, 7, 2, 8))?);
        let (t, mask) = (5, normal((2, 4, 5, 7))?);
        let masks = [
            mask.clone(),
            mask.narrow(0, 0, 1)?,
            mask.narrow(1, 0, 1)?,
            mask.narrow(2, 0, 1)?,
            mask.narrow(3, 0, 1)?,
            mask.get(0)?.get(0)?,
            mask.get(0)?.get(0)?.narrow(1, 0, 1)?,
            normal((7, t))?.t()?,
            normal(7)?,
            normal(1)?,
        ];
        for mask in masks {
            let scores = Scores { scale: 0.3, mask: Some(mask.clone()), ..Scores::default() };
            let expected = reference([&q, &k, &k], &scores)?;
            let [a, b] = [&q, &k].map(|x| x.to_dtype(DType::F32));
            let (a, b) = (a?, b?);
            let y = attention(&a, &b, &b, scores)?;
            assert!(apart(&y, &expected)? < 2e-6, "{:?}", mask.shape());
        }
        Ok(())
    }

    #[test]
    fn empty_inputs_have_empty_outputs_and_zero_gradients() -> Result<()> {
        for (batch, queries, heads, d) in [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)] {
            let q = Var::from_tensor(&Tensor::zeros(
                (batch, queries, heads, d),
                DType::F32,
                &Device::Cpu,
            )?)?;
            let k = Var::from_tensor(&Tensor::zeros((batch, 5, 2, d), DType::F32, &Device::Cpu)?)?;
            let y = attention(&q, &k, &k, Scores::default())?;
            assert_eq!(y.dims(), q.dims());
            let grads = y.sum_all()?.backward()?;
            assert!(grads.get(&q).is_some() && grads.get(&k).is_some(), "{:?}", q.dims());
        }
        Ok(())
    }

    #[test]
    fn operands_that_do_not_fit_are_errors() -> Result<()> {
        let x = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu);
        let f32 = |dims: &[usize]| x(dims, DType::F32);
        let q = f32(&[1, 3, 2, 4])?;
        let slopes = Some(Var::zeros(2, DType::F32, &Device::Cpu)?.into_inner());
        let with = |scores: Scores, q: &Tensor, k: &Tensor| {
            attention(q, k, k, scores).unwrap_err().to_string()
        };
        let plain = Scores::default;
        for (error, part) in [
            (with(plain(), &q, &x(&[1, 3, 2, 4], DType::BF16)?), "one dtype"),
            (with(plain(), &x(&[1, 3, 2, 4], DType::U8)?, &x(&[1, 3, 2, 4], DType::U8)?), "floats"),
            (with(plain(), &q, &f32(&[1, 3, 3, 4])?), "attention: q is"),
            (
                with(Scores { mask: Some(x(&[3, 3], DType::U8)?), ..plain() }, &q, &q),
                "the mask is U8",
            ),
            (with(Scores { slopes: Some(f32(&[3])?), ..plain() }, &q, &q), "slopes are [3]"),
            (with(Scores { slopes, ..plain() }, &q, &q), "no gradient"),
        ] {
            assert!(error.contains(part), "{error}");
        }
        let lens = Tensor::new(&[0u32, 3], &Device::Cpu)?;
        let (q, k, v) = (f32(&[3, 2, 4])?, f32(&[3, 2, 4])?, f32(&[8, 2, 4])?);
        let lens = [(&lens, 3), (&lens, 3)];
        let error = attention_varlen([&q, &k, &v], lens, plain()).unwrap_err().to_string();
        assert!(error.contains("attention: q is"), "{error}");
        Ok(())
    }
}
