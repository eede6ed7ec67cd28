//! What every layer promises, checked for each layer, option and dtype.

mod convolutions;
pub mod dense;

use crate::common::{bits, device, difference, fused, rnd};
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use lora::layers::Adapted;
use lora::{Bias, LoraConfig, LoraModule, Mode};
use loralib as lora;
use std::collections::{HashMap, HashSet};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

/// Two roundings of sums of a few dozen values, relative to the largest. F32 is F32 on a GPU too:
/// candle uses TF32 only where a program enables it.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 3e-6,
        DType::F16 => 5e-3,
        _ => 3e-2,
    }
}

pub struct Case<'a, K> {
    pub name: &'a str,
    pub weight: &'a [usize],
    pub bias: Option<usize>,
    pub input: &'a Tensor,
    pub cfg: LoraConfig,
    pub make: &'a dyn Fn(LoraConfig, VarBuilder) -> Result<Adapted<K>>,
    /// The output of the candle layer that `into_merged` returns.
    pub plain: &'a dyn Fn(Adapted<K>, &Tensor) -> Result<Tensor>,
}

/// The traits of every layer, checked by the compiler.
const fn is_a_layer<T: Module + LoraModule + Clone + std::fmt::Debug + Send + Sync>() {}
const _: () = {
    is_a_layer::<lora::Linear>();
    is_a_layer::<lora::MergedLinear>();
    is_a_layer::<lora::Embedding>();
    is_a_layer::<lora::Conv1d>();
    is_a_layer::<lora::Conv2d>();
    is_a_layer::<lora::Conv3d>();
};

pub fn check<K: Clone + std::fmt::Debug + Send + Sync + 'static>(case: &Case<K>) -> Result<()>
where
    Adapted<K>: Module,
{
    for dtype in DTYPES {
        contract(case, dtype).map_err(|e| e.context(format!("{} in {dtype:?}", case.name)))?;
    }
    Ok(())
}

/// Checks the layer without DoRA and with it.
pub fn check_with_dora<K: Clone + std::fmt::Debug + Send + Sync + 'static>(
    case: &Case<K>,
) -> Result<()>
where
    Adapted<K>: Module,
{
    check(case)?;
    let name = format!("{} with DoRA", case.name);
    check(&Case { name: &name, cfg: LoraConfig { use_dora: true, ..case.cfg }, ..*case })
}

fn contract<K: Clone + std::fmt::Debug + Send + Sync + 'static>(
    case: &Case<K>,
    dtype: DType,
) -> Result<()>
where
    Adapted<K>: Module,
{
    let name = format!("{} in {dtype:?}", case.name);
    let mut base = HashMap::from([("weight".to_owned(), rnd(1, case.weight, dtype)?)]);
    if let Some(n) = case.bias {
        base.insert("bias".to_owned(), rnd(2, &[n], dtype)?);
    }
    let frozen = || VarBuilder::from_tensors(base.clone(), dtype, &device());
    let float = case.input.dtype().is_float();
    let x = if float { case.input.to_dtype(dtype)? } else { case.input.clone() };
    let adapter = VarMap::new();
    let make = |cfg| (case.make)(cfg, lora::var_builder(frozen(), &adapter, Bias::None));
    let mut layer = make(case.cfg)?;
    assert_eq!(layer.mode(), Mode::Train);

    // A plain layer is one whose rank is 0.
    let mut plain = (case.make)(LoraConfig { r: 0, ..case.cfg }, frozen())?;
    assert!(plain.lora_a().is_none() && plain.lora_b().is_none() && plain.scaling() == 0.);
    let base_out = plain.forward(&x)?;
    assert!(!base_out.track_op(), "{name}: a frozen plain layer records no graph");
    plain.eval()?;
    assert!(!plain.is_merged());
    assert_eq!(plain.mode(), Mode::Eval);
    assert_eq!(bits(&plain.forward(&x)?)?, bits(&base_out)?, "{name}: r = 0 in both modes");

    if layer.lora_a().is_none() {
        assert_eq!(bits(&layer.forward(&x)?)?, bits(&base_out)?, "{name}: no split is enabled");
        assert!(lora::mark_only_lora_as_trainable(&adapter, Bias::None).is_err());
        return layer.eval();
    }

    // A new layer equals its base.
    assert_eq!(layer.scaling(), 1.5);
    let half = matches!(dtype, DType::F16 | DType::BF16);
    let apart = difference(&layer.forward(&x)?, &base_out)?;
    // With DoRA the product is rounded before the bias is added; a convolution's kernel with its update is in F32.
    let rounds = case.cfg.use_dora || (name.starts_with("Conv") && !fused());
    let limit = if rounds && half { tolerance(dtype) } else { 0. };
    assert!(apart <= limit, "{name}: a new update is zero, {apart} apart");
    assert_eq!(bits(&layer.merged_weight()?)?, bits(layer.weight())?, "{name}: a new merge");

    // Random factors change it.
    for (seed, (_, var)) in adapter.data().lock().unwrap().iter().enumerate() {
        assert_eq!(var.dtype(), if half { DType::F32 } else { dtype });
        var.set(&rnd(10 + seed as u64, var.dims(), var.dtype())?)?;
    }
    let train_out = layer.forward(&x)?;
    assert_eq!(train_out.dtype(), dtype);
    assert!(difference(&train_out, &base_out)? > 0.05, "{name}: the update has an effect");

    // Only the adapter gets gradients, and no others are kept.
    let grads = train_out.sqr()?.sum_all()?.backward()?;
    assert_eq!(lora::missing_grads(&adapter, &grads), Vec::<String>::new(), "{name}");
    let variables = if case.cfg.use_dora { 3 } else { 2 };
    assert_eq!(grads.get_ids().count(), variables, "{name}: gradients of the adapter only");

    // Evaluation merges, gives the same output, and records no graph.
    let (weight, saved) = (bits(layer.weight())?, lora::lora_state_dict(&adapter, Bias::None)?);
    layer.eval()?;
    assert!(layer.is_merged());
    let eval_out = layer.forward(&x)?;
    assert!(!eval_out.track_op(), "{name}: evaluation records no graph");
    assert!(difference(&eval_out, &train_out)? < tolerance(dtype), "{name}: merged = unmerged");
    assert_ne!(bits(&eval_out)?, bits(&base_out)?);
    let again = lora::lora_state_dict(&adapter, Bias::None)?;
    for (key, tensor) in &saved {
        assert_eq!(bits(tensor)?, bits(&again[key])?, "{name}: {key} is the same in both modes");
    }

    // Any number of rounds keeps every bit of the base and of the output.
    for _ in 0..3 {
        layer.eval()?;
        layer.train()?;
    }
    assert!(!layer.is_merged());
    assert_eq!(bits(layer.weight())?, weight, "{name}: the base is never written");
    assert_eq!(bits(&layer.forward(&x)?)?, bits(&train_out)?, "{name}: in training again");

    // A clone has a mode of its own.
    let mut clone = layer.clone();
    clone.eval()?;
    assert!(clone.is_merged() && !layer.is_merged());
    assert_eq!((clone.mode(), layer.mode()), (Mode::Eval, Mode::Train));

    // `into_merged` gives candle's layer.
    let merged = (case.plain)(layer.clone(), &x)?;
    let apart = difference(&merged, &eval_out)?;
    assert!(apart < tolerance(dtype), "{name}: into_merged differs by {apart} from evaluation");

    unmerged_evaluation(case, variables, &x, &train_out, make)?;

    // A merge that is not finite is an error and changes nothing.
    let a = adapter.data().lock().unwrap()["lora_A"].clone();
    a.set(&(a.ones_like()? * f64::MAX)?)?;
    assert!(layer.eval().is_err(), "{name}: a merge that is not finite");
    assert!(!layer.is_merged());
    assert_eq!(layer.mode(), Mode::Train);
    assert!(clone.eval().is_err());
    assert!(clone.is_merged());
    assert_eq!(bits(&clone.forward(&x)?)?, bits(&eval_out)?, "{name}: the old merge is kept");
    Ok(())
}

/// Without merging, evaluation adds the update, without dropout and without a graph.
fn unmerged_evaluation<K>(
    case: &Case<K>,
    variables: usize,
    x: &Tensor,
    train_out: &Tensor,
    make: impl Fn(LoraConfig) -> Result<Adapted<K>>,
) -> Result<()>
where
    Adapted<K>: Module,
{
    let name = format!("{} in {:?}", case.name, train_out.dtype());
    let mut unmerged = make(LoraConfig { merge_weights: false, ..case.cfg })?;
    unmerged.eval()?;
    assert!(!unmerged.is_merged());
    assert_eq!(unmerged.mode(), Mode::Eval);
    let out = unmerged.forward(x)?;
    assert!(!out.track_op());
    assert_eq!(bits(&out)?, bits(train_out)?, "{name}: unmerged evaluation");
    if x.dtype().is_float() {
        let mut layer = make(LoraConfig { merge_weights: false, lora_dropout: 0.5, ..case.cfg })?;
        let outs: Result<HashSet<_>> = (0..20).map(|_| bits(&layer.forward(x)?)).collect();
        assert!(outs?.len() > 1, "{name}: dropout in training");
        let grads = layer.forward(x)?.sqr()?.sum_all()?.backward()?;
        assert_eq!(grads.get_ids().count(), variables, "{name}: gradients with dropout");
        layer.eval()?;
        let apart = difference(&layer.forward(x)?, train_out)?;
        let limit = tolerance(train_out.dtype());
        assert!(apart < limit, "{name}: no dropout in evaluation");
    }
    Ok(())
}
