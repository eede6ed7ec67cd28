//! Values that are right at the edges of operations, or an error.

use super::adapter::CFG;
use crate::common::{difference, randn};
use candle_core::{DType, Device, IndexOp, Module, Result, Tensor, Var};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarMap};
use loralib as lora;
use loralib::nn::rotary_emb::{rope, rope_i, rope_thd};
use loralib::nn::{self, ops::softmax_last_dim, Embedding, VarBuilder};
use loralib::{Adapter, LoraConfig};
use std::collections::HashMap;

const CPU: Device = Device::Cpu;

fn rand(dims: &[usize]) -> Result<Tensor> {
    randn(dims, DType::F32, &CPU)
}

/// candle's kernel takes another row's angles where there are more than tokens.
#[test]
fn constants_are_rotated_by_the_angles_of_their_row() -> Result<()> {
    let (batch, heads, tokens, d) = (2, 3, 4, 6);
    let angles = rand(&[batch, tokens + 3, d / 2])?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    for (name, rotate, dims) in [
        (
            "rope",
            rope as fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
            [batch, heads, tokens, d],
        ),
        ("rope_i", rope_i, [batch, heads, tokens, d]),
        ("rope_thd", rope_thd, [batch, tokens, heads, d]),
    ] {
        let x = rand(&dims)?;
        let y = rotate(&x, &cos, &sin)?;
        for row in 0..batch {
            let (cos, sin) = (cos.i(row)?.narrow(0, 0, tokens)?, sin.i(row)?.narrow(0, 0, tokens)?);
            let own = rotate(&x.narrow(0, row, 1)?, &cos.contiguous()?, &sin.contiguous()?)?;
            assert!(difference(&y.narrow(0, row, 1)?, &own)? < 1e-6, "{name} {row}");
        }
        let tracked = rotate(Var::from_tensor(&x)?.as_tensor(), &cos, &sin)?;
        assert!(difference(&y, &tracked)? < 1e-6, "{name}");
    }
    Ok(())
}

#[test]
fn a_scalar_has_no_softmax() -> Result<()> {
    let x = Tensor::new(1f32, &CPU)?;
    assert!(softmax_last_dim(&x).unwrap_err().to_string().contains("a scalar"));
    assert!(softmax_last_dim(Var::from_tensor(&x)?.as_tensor()).is_err());
    Ok(())
}

#[test]
fn convolutions_that_do_not_fit_are_errors() -> Result<()> {
    let error = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (x, kernel) = (rand(&[1, 2, 8])?, rand(&[3, 2, 3])?);
    let one = |kernel: &Tensor, cfg| nn::Conv1d::new(kernel.clone(), None, cfg).forward(&x);
    let plain = Conv1dConfig::default();
    assert!(error(one(&rand(&[3, 2, 3, 3])?, plain)).contains("[3, 2, 3, 3]"));
    for cfg in [
        Conv1dConfig { stride: 0, ..plain },
        Conv1dConfig { dilation: 0, ..plain },
        Conv1dConfig { groups: 0, ..plain },
    ] {
        assert!(error(one(&kernel, cfg)).contains("at least 1"));
    }
    let x = rand(&[1, 2, 8, 8])?;
    let two = |kernel: &Tensor, cfg| nn::Conv2d::new(kernel.clone(), None, cfg).forward(&x);
    let plain = Conv2dConfig::default();
    assert!(error(two(&kernel, plain)).contains("[3, 2, 3]"));
    assert!(error(two(&rand(&[3, 2, 3, 3])?, Conv2dConfig { stride: 0, ..plain }))
        .contains("at least 1"));
    Ok(())
}

/// Half of a unit in the last place of the kernel is not nothing.
#[test]
fn a_small_update_of_a_half_precision_kernel_counts() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let vars = VarMap::new();
        let base = HashMap::from([("weight".to_owned(), Tensor::ones((2, 2, 3), dtype, &CPU)?)]);
        let vb =
            lora::var_builder(VarBuilder::from_tensors(base, dtype, &CPU), &vars, lora::Bias::None);
        let cfg = LoraConfig { r: 1, lora_alpha: 1., ..Default::default() };
        let layer = lora::conv1d_no_bias(2, 2, 3, Default::default(), cfg, vb)?;
        let x = Tensor::ones((1, 2, 4), dtype, &CPU)?;
        let x = (x * Tensor::new(&[[[1f32, -1., 1., -1.], [-1., 1., -1., 1.]]], &CPU)?
            .to_dtype(dtype)?)?;
        assert_eq!(
            layer.forward(&x)?.abs()?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?,
            0.
        );
        // A of 1 and B of 2⁻¹²: far less than 2⁻⁹, the kernel's unit in BF16, and 2⁻¹¹ in F16.
        for (name, var) in vars.data().lock().unwrap().iter() {
            let value = if name.ends_with("lora_A") { 1f32 } else { 1. / 4096. };
            let ramp = Tensor::arange(0f32, var.elem_count() as f32, &CPU)?.reshape(var.shape())?;
            var.set(
                &(if name.ends_with("lora_A") {
                    ramp
                } else {
                    (var.ones_like()? * f64::from(value))?
                }),
            )?;
        }
        let y = layer.forward(&x)?.to_dtype(DType::F32)?;
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let delta = {
            let factor = |t: Option<&Tensor>| wide(t.unwrap());
            factor(layer.lora_b())?.matmul(&factor(layer.lora_a())?)?.reshape((2, 2, 3))?
        };
        let expected = wide(&x)?.conv1d(&delta, 0, 1, 1, 1)?;
        assert!(expected.abs()?.max_all()?.to_scalar::<f32>()? > 0.);
        assert!(difference(&y, &expected)? < 1e-2, "{dtype:?}: {y} {expected}");
    }
    Ok(())
}

/// m·w/‖w‖ of zeros is 0/0.
#[test]
fn dora_over_an_output_of_zeros_is_an_error() -> lora::Result<()> {
    let weight = Tensor::new(&[[1f32, 2.], [0., 0.]], &CPU)?;
    let vb = || {
        let base = HashMap::from([("fc.weight".to_owned(), weight.clone())]);
        VarBuilder::from_tensors(base, DType::F32, &CPU)
    };
    let cfg = LoraConfig { use_dora: true, ..CFG };
    let tensors = |b: &[[f32; 2]; 2]| {
        let of = |name: &str, t: Tensor| (format!("fc.{name}"), t);
        lora::LoraWeights::new(
            cfg,
            [
                of("lora_A", Tensor::new(&[[1f32, 0.], [0., 1.]], &CPU)?),
                of("lora_B", Tensor::new(b, &CPU)?),
                of("lora_magnitude_vector", Tensor::new(&[1f32, 1.], &CPU)?),
            ]
            .into(),
        )
    };
    let zero = tensors(&[[1., 1.], [0., 0.]])?;
    let adapter = Adapter::from_weights(&zero)?;
    let _layer = nn::linear_no_bias(2, 2, adapter.var_builder(vb()).pp("fc"))?;
    let error = adapter.check().unwrap_err().to_string();
    assert!(error.contains("fc.weight") && error.contains("output 1"), "{error}");
    let zero = zero.with_kind("fc", lora::layers::LayerKind::Linear)?;
    let base = [("fc.weight".to_owned(), weight.clone())].into();
    let error = lora::merge::merge_into(&base, &zero).unwrap_err().to_string();
    assert!(error.contains("output 1"), "{error}");
    // With an update the output has a direction.
    let adapter = Adapter::from_weights(&tensors(&[[1., 1.], [0., 3.]])?)?;
    let layer = nn::linear_no_bias(2, 2, adapter.var_builder(vb()).pp("fc"))?;
    adapter.check()?;
    let y = layer.forward(&Tensor::new(&[[0f32, 1.]], &CPU)?)?.to_vec2::<f32>()?;
    assert!((y[0][1] - 1.).abs() < 1e-6, "{y:?}");
    Ok(())
}

/// As torch's `F.embedding(..., padding_idx)`.
#[test]
fn the_row_of_padding_is_not_trained() -> lora::Result<()> {
    let ids = Tensor::new(&[[1u32, 0, 2, 0]], &CPU)?;
    let table = Var::from_tensor(&rand(&[4, 3])?)?;
    let layer = Embedding::new(table.as_tensor().clone(), 3).with_padding_idx(0)?;
    let grads = layer.forward(&ids)?.sum_all()?.backward()?;
    assert_eq!(
        grads.get(&table).unwrap().sum(1)?.to_vec1::<f32>()?,
        [0., 3., 3., 0.],
        "of the table"
    );
    let adapter = Adapter::new(LoraConfig { r: 2, ..CFG }).targets(["embed"]);
    let base = HashMap::from([("embed.weight".to_owned(), rand(&[4, 3])?)]);
    let vb = adapter.var_builder(VarBuilder::from_tensors(base, DType::F32, &CPU));
    let plain = nn::embedding(4, 3, vb.pp("embed"))?;
    let layer = plain.clone().with_padding_idx(0)?;
    let named = adapter.named_vars()?;
    let of = |layer: &Embedding, name: &str| -> Result<Tensor> {
        let grads = layer.forward(&ids)?.sqr()?.sum_all()?.backward()?;
        Ok(grads.get(&named[name]).unwrap().clone())
    };
    let (a, without) = (of(&layer, "embed.lora_A")?, of(&plain, "embed.lora_A")?);
    assert_eq!(a.i((.., 0))?.abs()?.sum_all()?.to_scalar::<f32>()?, 0.);
    assert!(without.i((.., 0))?.abs()?.sum_all()?.to_scalar::<f32>()? > 0.);
    assert_eq!(a.i((.., 1..))?.to_vec2::<f32>()?, without.i((.., 1..))?.to_vec2::<f32>()?);
    assert_eq!(layer.forward(&ids)?.to_vec3::<f32>()?, plain.forward(&ids)?.to_vec3::<f32>()?);
    assert!(plain.with_padding_idx(4).unwrap_err().to_string().contains("4 rows"));
    Ok(())
}

#[test]
fn wrong_gradients_are_found_beside_a_large_loss_or_not_compared() -> lora::Result<()> {
    let (vars, x) = (VarMap::new(), rand(&[4, 6])?);
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let layer = lora::linear_no_bias(6, 5, LoraConfig { r: 2, ..Default::default() }, vb)?;
    let (a, b) = (layer.lora_a().unwrap(), layer.lora_b().unwrap());
    let held = vars.data().lock().unwrap().clone();
    held["lora_B"].set(&rand(&[5, 2])?)?;
    let loss = |offset: f64| layer.forward(&x)?.sqr()?.mean_all()? + offset;
    let changed = |factor: f64| -> Result<_> {
        let mut grads = loss(0.)?.backward()?;
        for t in [a, b] {
            let grad = (grads.get(t).unwrap() * factor)?;
            grads.insert(t, grad);
        }
        Ok(grads)
    };
    lora::utils::check_grads(&vars, &changed(1.)?, || loss(0.))?;
    for factor in [-1., 0.6, 1.4] {
        let error = lora::utils::check_grads(&vars, &changed(factor)?, || loss(0.)).unwrap_err();
        assert!(error.to_string().contains("lora_A"), "{factor}: {error}");
    }
    // A finite difference of an F32 loss near 10⁶ tells nothing.
    for factor in [-1., 1.] {
        let error = lora::utils::check_grads(&vars, &changed(factor)?, || loss(1e6)).unwrap_err();
        assert!(error.to_string().contains("too small to be compared"), "{error}");
    }
    Ok(())
}
