//! The crate against Microsoft's loralib and PEFT's DoRA, whose values `../fixtures/golden.py` and
//! `../fixtures/dora.py` wrote.

pub mod case;
mod names;

use crate::common::device;
use candle_core::{Module, Result, Tensor, Var};
use candle_nn::{
    AdamW, Conv1dConfig, Conv2dConfig, Optimizer, ParamsAdamW, VarBuilder, VarMap, SGD,
};
use case::{cases, Case, Tensors};
use lora::layers::{Adapted, Conv3dConfig};
use lora::{LoraConfig, LoraModule};
use loralib as lora;
use std::collections::BTreeSet;

const STEPS: usize = 3;

fn var_map(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Result<VarMap> {
    let vars = VarMap::new();
    for (name, tensor) in tensors {
        vars.data().lock().unwrap().insert(name, Var::from_tensor(&tensor)?);
    }
    Ok(vars)
}

fn names(vars: &VarMap) -> BTreeSet<String> {
    vars.data().lock().unwrap().keys().cloned().collect()
}

/// Compares outputs, gradients, merges and training steps, each with a new layer.
fn check<K>(case: &Case, way: &str, make: impl Fn() -> Result<(Adapted<K>, VarMap)>) -> Result<()>
where
    Adapted<K>: Module,
{
    let x = case.tensors["x"].clone();
    let x = if x.dtype().is_float() { Var::from_tensor(&x)?.into_inner() } else { x };
    let compare = |name: &str, ours: &Tensor| case.compare(way, name, ours);

    let (mut layer, vars) = make()?;
    let y = layer.forward(&x)?;
    compare("y", &y)?;
    let grads = (y * &case.tensors["probe"])?.sum_all()?.backward()?;
    if x.is_variable() {
        compare("grad.x", grads.get(&x).expect("no gradient of x"))?;
    }
    for (name, var) in vars.data().lock().unwrap().iter() {
        match (case.trained().contains(name), grads.get(var)) {
            (true, Some(grad)) => compare(&format!("grad.{name}"), grad)?,
            (trained, grad) => assert_eq!(trained, grad.is_some(), "{way}: gradient of {name}"),
        }
    }

    layer.eval()?;
    compare("eval", &layer.forward(&x)?)?;
    compare("merged", &layer.merged_weight()?)?;
    compare("weight", layer.weight())?;

    if case.is_half() {
        // In half precision the optimizer's steps differ by rounding.
        return Ok(());
    }
    let adamw = ParamsAdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let (layer, vars) = make()?;
    train(
        &layer,
        &x,
        SGD::new(lora::mark_only_lora_as_trainable(&vars, case.trainable())?, 0.02)?,
    )?;
    compare_trained(case, way, "sgd", &vars)?;
    let (layer, vars) = make()?;
    train(
        &layer,
        &x,
        AdamW::new(lora::mark_only_lora_as_trainable(&vars, case.trainable())?, adamw)?,
    )?;
    compare_trained(case, way, "adamw", &vars)
}

fn train(layer: &impl Module, x: &Tensor, mut optimizer: impl Optimizer) -> Result<()> {
    (0..STEPS).try_for_each(|_| optimizer.backward_step(&layer.forward(x)?.sqr()?.mean_all()?))
}

fn compare_trained(case: &Case, way: &str, optimizer: &str, vars: &VarMap) -> Result<()> {
    let saved = lora::lora_state_dict(vars, case.trainable())?;
    assert_eq!(saved.keys().cloned().collect::<BTreeSet<_>>(), case.trained(), "{way}");
    let mut saved = saved.iter();
    saved.try_for_each(|(name, ours)| case.compare(way, &format!("{optimizer}.{name}"), ours))
}

/// Every case of a layer, constructed in every way: `wrap` gets a weight and a bias, `new` takes all tensors
/// from the `VarBuilder`.
fn check_all<K>(
    layer: &str,
    wrap: impl Fn(&Case, Tensor, Option<Tensor>, VarBuilder) -> Result<Adapted<K>>,
    new: impl Fn(&Case, VarBuilder) -> Result<Adapted<K>>,
) -> Result<()>
where
    Adapted<K>: Module,
{
    for case in cases(layer)? {
        check(&case, "wrapped", || {
            let mut all = case.parameters();
            let bias = all.get("bias").cloned();
            let weight = all["weight"].clone();
            all.retain(|name, _| case.trained().contains(name));
            let vars = var_map(all)?;
            let own = vars.data().lock().unwrap().get("weight").map(|v| v.as_tensor().clone());
            let layer = wrap(&case, own.unwrap_or(weight), bias, case.builder(&vars))?;
            assert_eq!(names(&vars), case.trained());
            Ok((layer, vars))
        })?;
        check(&case, "all in one VarMap", || {
            let vars = var_map(case.parameters())?;
            let layer = new(&case, case.builder(&vars))?;
            assert_eq!(names(&vars), case.parameters().into_keys().collect());
            Ok((layer, vars))
        })?;
        check(&case, "frozen base and adapter", || {
            let is_lora = |(name, _): &(String, Tensor)| name.starts_with("lora_");
            let (factors, base): (Tensors, Tensors) =
                case.parameters().into_iter().partition(is_lora);
            let vars = var_map(factors)?;
            let base = VarBuilder::from_tensors(base, case.dtype, &device());
            let layer = new(&case, lora::var_builder(base, &vars, case.trainable()))?;
            assert_eq!(names(&vars), case.trained());
            Ok((layer, vars))
        })?;
    }
    Ok(())
}

#[test]
fn linear_agrees_with_loralib_and_peft() -> Result<()> {
    check_all(
        "Linear",
        |c, w, b, vb| lora::Linear::new(candle_nn::Linear::new(w, b), c.config(), vb),
        |c, vb| lora::layers::linear_b(c.size("in"), c.size("out"), c.flag("bias"), c.config(), vb),
    )
}

#[test]
fn merged_linear_agrees_with_loralib() -> Result<()> {
    check_all(
        "MergedLinear",
        |c, w, b, vb| {
            let base = candle_nn::Linear::new(w, b);
            lora::MergedLinear::new(base, &c.enable_lora(), c.config(), vb)
        },
        |c, vb| {
            let new =
                if c.flag("bias") { lora::merged_linear } else { lora::merged_linear_no_bias };
            new(c.size("in"), c.size("out"), &c.enable_lora(), c.config(), vb)
        },
    )
}

#[test]
fn embedding_agrees_with_loralib_and_peft() -> Result<()> {
    check_all(
        "Embedding",
        |c, w, _, vb| {
            lora::Embedding::new(candle_nn::Embedding::new(w, c.size("out")), c.config(), vb)
        },
        |c, vb| lora::embedding(c.size("in"), c.size("out"), c.config(), vb),
    )
}

/// (padding, stride, dilation, groups)
type Options = [usize; 4];
type New<C> = fn(usize, usize, usize, C, LoraConfig, VarBuilder) -> Result<Adapted<C>>;

fn check_conv<C>(
    layer: &str,
    config: impl Fn(Options) -> C,
    wrap: impl Fn(Tensor, Option<Tensor>, C, LoraConfig, VarBuilder) -> Result<Adapted<C>>,
    no_bias: New<C>,
    with_bias: New<C>,
) -> Result<()>
where
    Adapted<C>: Module,
{
    let config = |c: &Case| config(["padding", "stride", "dilation", "groups"].map(|o| c.size(o)));
    check_all(
        layer,
        |c, w, b, vb| wrap(w, b, config(c), c.config(), vb),
        |c, vb| {
            let new = if c.flag("bias") { with_bias } else { no_bias };
            new(c.size("in"), c.size("out"), c.size("k"), config(c), c.config(), vb)
        },
    )
}

#[test]
fn conv1d_agrees_with_loralib_and_peft() -> Result<()> {
    check_conv(
        "Conv1d",
        |[padding, stride, dilation, groups]| Conv1dConfig {
            padding,
            stride,
            dilation,
            groups,
            ..Default::default()
        },
        |w, b, conv, cfg, vb| lora::Conv1d::new(candle_nn::Conv1d::new(w, b, conv), cfg, vb),
        lora::conv1d_no_bias,
        lora::conv1d,
    )
}

#[test]
fn conv2d_agrees_with_loralib_and_peft() -> Result<()> {
    check_conv(
        "Conv2d",
        |[padding, stride, dilation, groups]| Conv2dConfig {
            padding,
            stride,
            dilation,
            groups,
            ..Default::default()
        },
        |w, b, conv, cfg, vb| lora::Conv2d::new(candle_nn::Conv2d::new(w, b, conv), cfg, vb),
        lora::conv2d_no_bias,
        lora::conv2d,
    )
}

#[test]
fn conv3d_agrees_with_loralib_and_peft() -> Result<()> {
    check_conv(
        "Conv3d",
        |[padding, stride, dilation, groups]| Conv3dConfig { padding, stride, dilation, groups },
        lora::Conv3d::new,
        lora::conv3d_no_bias,
        lora::conv3d,
    )
}
