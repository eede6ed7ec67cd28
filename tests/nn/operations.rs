//! Each replaced operation has the values of candle's fused one and the gradients of candle's composed one.

use crate::common::{device, difference, faer, fused, randn};
use candle_core::{DType, Result, Tensor, Var, D};
use loralib::nn;
use nn::attention::{flash_attn, AttnMask};

/// Values and gradients of `ours` and `theirs` for random inputs of the given shapes, relative to the
/// largest. `trained` says which inputs are variables.
fn compare(
    name: &str,
    shapes: &[&[usize]],
    ours: impl Fn(&[Tensor]) -> Result<Tensor>,
    theirs: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    // candle's own kernels on the CPU sum in half precision.
    let half = if device().is_cpu() && !fused() { 0.1 } else { 4e-2 };
    for (dtype, tolerance) in [(DType::F32, 5e-6), (DType::F64, 1e-12), (DType::BF16, half)] {
        for trained in 1..1u32 << shapes.len() {
            let inputs = shapes.iter().map(|dims| {
                Var::from_tensor(&randn(*dims, DType::F64, &device())?.to_dtype(dtype)?)
            });
            let vars = inputs.collect::<Result<Vec<_>>>()?;
            let tracked = |i: usize| trained >> i & 1 == 1;
            let own: Vec<_> = vars
                .iter()
                .enumerate()
                .map(
                    |(i, v)| {
                        if tracked(i) {
                            v.as_tensor().clone()
                        } else {
                            v.as_detached_tensor()
                        }
                    },
                )
                .collect();
            // The reference in F64 where half precision is compared.
            let wide = |t: &Tensor| {
                if dtype == DType::BF16 {
                    t.to_dtype(DType::F32)
                } else {
                    Ok(t.clone())
                }
            };
            let all: Vec<_> = vars.iter().map(|v| wide(v.as_tensor())).collect::<Result<_>>()?;
            let (y, expected) = (ours(&own)?, theirs(&all)?);
            assert_eq!((y.dims(), y.dtype()), (expected.dims(), dtype), "{name}");
            let relative = |a: &Tensor, b: &Tensor| -> Result<f64> {
                let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
                let largest = b.abs()?.max_all()?.to_scalar::<f64>()?.max(1e-3);
                Ok(difference(&a, &b)? / largest)
            };
            let apart = relative(&y, &expected)?;
            assert!(apart < tolerance, "{name} in {dtype:?}: values {apart:e}");
            let probe = randn(y.shape(), DType::F64, &device())?.to_dtype(dtype)?;
            let grads = (&y * &probe)?.sum_all()?.backward()?;
            let reference = (&expected * wide(&probe)?)?.sum_all()?.backward()?;
            for (i, var) in vars.iter().enumerate() {
                let Some(g) = grads.get(var) else {
                    assert!(!tracked(i), "{name} in {dtype:?}: no gradient for input {i}");
                    continue;
                };
                assert!(tracked(i), "{name}: input {i} is frozen");
                let apart = relative(g, reference.get(var).unwrap())?;
                assert!(apart < tolerance, "{name} in {dtype:?}: gradient {i} {apart:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn softmax_has_a_backward() -> Result<()> {
    for dims in [&[2, 3, 40][..], &[5, 7], &[1, 1]] {
        compare(
            "softmax",
            &[dims],
            |x| nn::ops::softmax_last_dim(&x[0]),
            |x| nn::ops::softmax(&x[0], D::Minus1),
        )?;
    }
    Ok(())
}

#[test]
fn norms_have_a_backward_for_input_gain_and_bias() -> Result<()> {
    for dims in [&[2, 3, 40][..], &[4, 7]] {
        let n = &[dims[dims.len() - 1]][..];
        compare(
            "rms_norm",
            &[dims, n],
            |x| nn::ops::rms_norm(&x[0], &x[1], 1e-5),
            |x| nn::ops::rms_norm_slow(&x[0], &x[1], 1e-5),
        )?;
        compare(
            "layer_norm",
            &[dims, n, n],
            |x| nn::ops::layer_norm(&x[0], &x[1], &x[2], 1e-5),
            |x| nn::ops::layer_norm_slow(&x[0], &x[1], &x[2], 1e-5),
        )?;
        let zeros = |x: &Tensor| x.zeros_like();
        compare(
            "layer_norm without a bias",
            &[dims, n],
            |x| nn::Module::forward(&nn::LayerNorm::new_no_bias(x[1].clone(), 1e-5), &x[0]),
            |x| nn::ops::layer_norm_slow(&x[0], &x[1], &zeros(&x[1])?, 1e-5),
        )?;
    }
    Ok(())
}

#[test]
fn activations_equal_candles() -> Result<()> {
    type Op = fn(&Tensor) -> Result<Tensor>;
    let all: [(&str, Op, Op); 4] = [
        // candle's own backward rounds its constants.
        ("gelu", nn::ops::gelu, |x| {
            let z = ((x * 0.044_715)? * x.sqr()?)? + x;
            x * ((z? * (2. / std::f64::consts::PI).sqrt())?.tanh()? + 1.)?.affine(0.5, 0.)?
        }),
        ("gelu_erf", nn::ops::gelu_erf, |x| {
            x * ((x / std::f64::consts::SQRT_2)?.erf()? + 1.)?.affine(0.5, 0.)?
        }),
        ("silu", nn::ops::silu, |x| x.silu()),
        ("swiglu", nn::ops::swiglu, candle_nn::ops::swiglu),
    ];
    for (name, ours, theirs) in all {
        compare(name, &[&[3, 50]], |x| ours(&x[0]), |x| theirs(&x[0]))?;
    }
    Ok(())
}

#[test]
fn rotary_embeddings_are_differentiable_in_each_layout() -> Result<()> {
    let (b, h, t, d) = (2, 3, 5, 8);
    let angles =
        |dims: &[usize], dtype| (randn(dims, DType::F64, &device())? * 1.5)?.to_dtype(dtype);
    for batched in [false, true] {
        // candle reads a longer batched table at wrong offsets.
        let dims = if batched { vec![b, t, d / 2] } else { vec![t + 2, d / 2] };
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let (cos, sin) = (angles(&dims, dtype)?.cos()?, angles(&dims, dtype)?.sin()?);
            type Rope = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;
            let all: [(Rope, Rope, [usize; 4]); 3] = [
                (nn::rotary_emb::rope, candle_nn::rotary_emb::rope, [b, h, t, d]),
                (nn::rotary_emb::rope_i, candle_nn::rotary_emb::rope_i, [b, h, t, d]),
                (nn::rotary_emb::rope_thd, candle_nn::rotary_emb::rope_thd, [b, t, h, d]),
            ];
            for (ours, theirs, dims) in all {
                let x = Var::from_tensor(&randn(&dims, DType::F64, &device())?.to_dtype(dtype)?)?;
                let (y, expected) = (ours(&x, &cos, &sin)?, theirs(&x, &cos, &sin)?);
                let tolerance = if dtype == DType::BF16 { 4e-2 } else { 1e-6 };
                assert!(difference(&y, &expected)? < tolerance);
                // The transpose of a linear map: ⟨rope(x), g⟩ = ⟨x, gx⟩ for every g.
                let g = randn(&dims, DType::F64, &device())?.to_dtype(dtype)?;
                let grads = (&y * &g)?.sum_all()?.backward()?;
                let back = theirs(&g, &cos, &sin.neg()?)?;
                assert!(difference(grads.get(&x).unwrap(), &back)? < tolerance);
            }
        }
    }
    Ok(())
}

#[test]
fn attention_equals_its_composition_for_every_mask_and_grouping() -> Result<()> {
    let (b, s, t, h, d) = (2, 5, 7, 4, 8);
    let mask = randn((b, 1, s, t), DType::F64, &device())?;
    for kv in [1, 2, 4] {
        let q_dims: &[usize] = &[b, s, h, d];
        let kv_dims: &[usize] = &[b, t, kv, d];
        for case in ["none", "added", "causal"] {
            let causal = || {
                let seen = |i, j| if j <= i + 2 { 0. } else { f64::NEG_INFINITY };
                let all = (0..s).flat_map(|i| (0..t).map(move |j| seen(i, j)));
                Tensor::from_vec(all.collect(), (s, t), &device())
            };
            let ours = |x: &[Tensor]| {
                let mask = match case {
                    "none" => AttnMask::None,
                    "added" => AttnMask::Mask(mask.to_dtype(x[0].dtype())?),
                    _ => AttnMask::Causal { kv_offset: 2 },
                };
                flash_attn::<f32>(&x[0], &x[1], &x[2], 0.5, mask, None, None)
            };
            let theirs = |x: &[Tensor]| {
                let heads = |x: &Tensor| {
                    let x = x.transpose(1, 2)?.contiguous()?.unsqueeze(2)?;
                    let (b, k, _, t, d) = x.dims5()?;
                    x.expand((b, k, h / k, t, d))?.reshape((b, h, t, d))
                };
                let scores = (heads(&x[0])?.matmul(&heads(&x[1])?.t()?)? * 0.5)?;
                let scores = match case {
                    "none" => scores,
                    "added" => scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?,
                    _ => scores.broadcast_add(&causal()?.to_dtype(scores.dtype())?)?,
                };
                nn::ops::softmax(&scores, D::Minus1)?.matmul(&heads(&x[2])?)
            };
            compare(case, &[q_dims, kv_dims, kv_dims], ours, theirs)?;
        }
    }
    Ok(())
}

#[test]
fn attention_keeps_nan_and_refuses_other_shapes() -> Result<()> {
    let x = |dims: &[usize]| -> Result<Tensor> {
        Ok(Var::from_tensor(&randn(dims, DType::F32, &device())?)?.into_inner())
    };
    let attention = nn::attention::multi_head_attention;
    let (q, nan) = (x(&[1, 3, 2, 4])?, Tensor::full(f32::NAN, (1, 3, 2, 4), &device())?);
    let values = |q: &Tensor, mask: Option<&Tensor>| -> Result<Vec<f32>> {
        let y = attention(q, &x(&[1, 3, 2, 4])?, &x(&[1, 3, 2, 4])?, 0.5, mask)?;
        y.flatten_all()?.to_vec1()
    };
    assert!(values(&nan, None)?.iter().all(|y| y.is_nan()));
    // A query without a key gives zeros where attention is fused, and NaN where it is composed.
    let mask = Tensor::full(f32::NEG_INFINITY, (3, 3), &device())?;
    assert!(values(&q, Some(&mask))?.iter().all(|y| if faer() { *y == 0. } else { y.is_nan() }));
    for dims in [[1, 3, 0, 4], [1, 3, 3, 4], [2, 3, 2, 4], [1, 3, 2, 5]] {
        let error = attention(&q, &x(&dims)?, &x(&dims)?, 0.5, None).unwrap_err();
        assert!(error.to_string().contains("attention: "), "{error}");
    }
    Ok(())
}

#[test]
fn caches_store_nothing_while_a_gradient_is_wanted() -> Result<()> {
    let new = |tracked: bool| -> Result<Tensor> {
        let x = Var::from_tensor(&randn((1, 2, 3, 4), DType::F32, &device())?)?;
        Ok(if tracked { x.into_inner() } else { x.as_detached_tensor() })
    };
    macro_rules! check {
        ($cache:expr) => {{
            let mut cache = $cache;
            let (k, v) = (new(false)?, new(false)?);
            let (all, _) = cache.append(&k, &v)?;
            assert_eq!(all.dims(), [1, 2, 3, 4]);
            let (tracked, v) = (new(true)?, new(true)?);
            for _ in 0..2 {
                let (all, _) = cache.append(&tracked, &v)?;
                assert_eq!(all.dims(), [1, 2, 6, 4]);
                assert_eq!(difference(&all.narrow(2, 0, 3)?, &k)?, 0.);
                assert_eq!(all.sum_all()?.backward()?.get_ids().count(), 2, "the graph is whole");
            }
            // One of the two is enough.
            for (k, v) in [(&tracked, new(false)?), (&k, new(true)?)] {
                let (all_k, all_v) = cache.append(k, &v)?;
                assert!(all_k.track_op() || all_v.track_op());
            }
            assert_eq!(cache.current_seq_len(), 3);
            let token = |t: &Tensor| t.narrow(2, 0, 1);
            let error = cache.append(&token(&tracked)?, &token(&v)?).unwrap_err().to_string();
            assert!(error.contains("`eval()`"), "{error}");
            cache.reset();
            let (all, _) = cache.append(&tracked, &v)?;
            assert_eq!(all.dims(), [1, 2, 3, 4]);
        }};
    }
    check!(nn::kv_cache::KvCache::new(2, 8));
    check!(nn::kv_cache::RotatingKvCache::new(2, 8));
    check!(nn::kv_cache::ConcatKvCache::new(2));
    Ok(())
}

#[test]
fn a_frozen_layer_gets_no_gradient_and_equals_candles() -> Result<()> {
    let x = Var::from_tensor(&randn((2, 3, 6), DType::F32, &device())?)?;
    let w = randn((5, 6), DType::F32, &device())?;
    let b = randn(5, DType::F32, &device())?;
    let ours = nn::Linear::new(w.clone(), Some(b.clone()));
    let candle = candle_nn::Linear::new(w, Some(b));
    let (y, expected) = (nn::Module::forward(&ours, &x)?, nn::Module::forward(&candle, &x)?);
    assert!(difference(&y, &expected)? < 1e-5);
    assert_eq!(y.sum_all()?.backward()?.get_ids().count(), 1);
    // Convolutions take any kernel, also one that is not square.
    let x = randn((2, 4, 9, 8), DType::F32, &device())?;
    let w = randn((6, 4, 3, 2), DType::F32, &device())?;
    let config = nn::Conv2dConfig { padding: 1, ..Default::default() };
    let y = nn::Module::forward(&nn::Conv2d::new(w.clone(), None, config), &x)?;
    assert!(difference(&y, &x.conv2d(&w, 1, 1, 1, 1)?)? < 1e-4);
    Ok(())
}

/// candle's own kernel serves what it computes as it says, and this crate's the rest.
#[test]
fn attention_gives_the_same_with_and_without_a_gradient() -> Result<()> {
    for (batch, queries, keys) in [(1, 5, 7), (2, 5, 7), (2, 7, 5), (2, 1, 9)] {
        let x = |tokens| randn((batch, tokens, 2, 8), DType::F32, &device());
        let (q, k) = (x(queries)?, x(keys)?);
        let tracked = Var::from_tensor(&q)?;
        let added = randn((1, 1, queries, keys), DType::F32, &device())?;
        let masks = [0, 2, 4].map(|offset| AttnMask::Causal { kv_offset: offset });
        for mask in [AttnMask::None, AttnMask::Mask(added)].into_iter().chain(masks) {
            for (softcap, bias) in
                [(None, None), (Some(0.), None), (Some(2.), None), (None, Some(8.))]
            {
                if bias.is_some() && !mask.is_causal() {
                    continue;
                }
                let attention =
                    |q: &Tensor| flash_attn::<f32>(q, &k, &k, 0.5, mask.clone(), bias, softcap);
                let apart = difference(&attention(&q)?, &attention(&tracked)?)?;
                assert!(apart < 1e-5, "{batch}, {queries}, {keys}, {softcap:?} {bias:?}: {apart}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_mask_has_a_gradient_beside_frozen_operands() -> Result<()> {
    let x = randn((1, 3, 2, 4), DType::F32, &device())?;
    let mask = Var::from_tensor(&randn((3, 3), DType::F32, &device())?)?;
    let added = AttnMask::Mask(mask.as_tensor().clone());
    let y = flash_attn::<f32>(&x, &x, &x, 1., added, None, None)?.transpose(1, 2)?;
    let other = nn::attention::multi_head_attention(&x, &x, &x, 1., Some(&mask))?;
    for y in [y, other] {
        assert!(y.sqr()?.sum_all()?.backward()?.get(&mask).is_some());
    }
    Ok(())
}
