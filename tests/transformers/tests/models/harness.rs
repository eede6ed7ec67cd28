//! The test that each model has to pass.

use crate::weights::{random, Weights};
use candle::backprop::GradStore;
use candle::{DType, Device, Result, Shape, Tensor};
use loralib::nn::VarBuilder;
use loralib::{self as lora, Adapter, Adapters, LoraConfig};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::HashMap;

/// A model on its input.
pub type Forward = Box<dyn FnMut() -> Result<Tensor>>;

/// A model's constructor, and whether it takes the branch of flash attention.
pub type Build = fn(VarBuilder<'static>, bool) -> Result<Forward>;

/// See [`Case::dense`].
pub fn dense(model: &str) -> &'static [&'static str] {
    match model {
        "debertav2" => &["rel_embeddings"],
        "deepseek2" => &["gate.weight"],
        "granitemoehybrid" => &["embed_tokens"],
        "openclip" => &["in_proj_weight"],
        "siglip" => &["in_proj_weight", "position_embedding"],
        "whisper" => &["embed_positions", "embed_tokens"],
        _ => &[],
    }
}

pub struct Case {
    pub name: &'static str,
    pub targets: &'static [&'static str],
    /// Whether the model computes in F64 too.
    pub double: bool,
    /// Parts of the names of matrices that the model's own code computes with, so that they cannot be quantised.
    pub dense: &'static [&'static str],
    /// Whether it has a branch of flash attention.
    pub flash: bool,
    pub copied: Build,
    pub unmodified: Build,
}

/// A module with the test of a model, from its file's name, the targets and its constructor, which is
/// compiled twice: `m` is the copied file and then the original. `F32` says that its code has F32 constants.
macro_rules! model {
    ($name:ident, $targets:expr, |$m:ident, $vb:ident| $body:expr) => {
        $crate::harness::model!($name, $targets, F64, |$m, $vb| $body);
    };
    ($name:ident, $targets:expr, $dtype:ident, |$m:ident, $vb:ident| $body:expr) => {
        $crate::harness::model!($name, $targets, $dtype, false, |$m, $vb, _flash| $body);
    };
    ($name:ident, $targets:expr, |$m:ident, $vb:ident, $flash:ident| $body:expr) => {
        $crate::harness::model!($name, $targets, F64, true, |$m, $vb, $flash| $body);
    };
    ($name:ident, $targets:expr, $dtype:ident, |$m:ident, $vb:ident, $flash:ident| $body:expr) => {
        $crate::harness::model!($name, $targets, $dtype, true, |$m, $vb, $flash| $body);
    };
    ($name:ident, $targets:expr, $dtype:ident, $has:expr, |$m:ident, $vb:ident, $flash:ident| $body:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn trains_and_serves() -> loralib::Result<()> {
                fn copied($vb: VarBuilder<'static>, $flash: bool) -> Result<Forward> {
                    use transformers::models::$name as $m;
                    $body
                }
                fn unmodified($vb: VarBuilder<'static>, $flash: bool) -> Result<Forward> {
                    use candle_transformers::models::$name as $m;
                    $body
                }
                let double = candle::DType::$dtype == candle::DType::F64;
                let (name, targets) = (stringify!($name), &$targets);
                let (dense, flash) = ($crate::harness::dense(name), $has);
                let case = $crate::harness::Case {
                    name,
                    targets,
                    double,
                    dense,
                    flash,
                    copied,
                    unmodified,
                };
                case.check()
            }
        }
    };
}
pub(crate) use model;

/// The largest difference of gradients in F32 from those in F64, relative to a tensor's largest value.
const GRADIENTS: f64 = 1e-4;
/// The largest difference of outputs in F32, relative to the largest value.
const OUTPUTS: f64 = 1e-5;
/// The largest difference of outputs and gradients over quantised weights from those over dense ones.
const QUANTIZED: f64 = 1e-4;

const CFG: LoraConfig = LoraConfig { r: 2, lora_alpha: 3., ..LoraConfig::DEFAULT };

impl Case {
    pub fn check(&self) -> lora::Result<()> {
        let weights = Weights::default();
        // Names and initialisations of all weights.
        let before = (self.unmodified)(weights.var_builder(DType::F32), false)?()?;
        let single = Adapted::new(self, weights.var_builder(DType::F32), DType::F32, false)?;
        let (output, grads) = single.backward()?;
        assert!(relative(&output, &before)? > 1e-3, "the adapter has an effect");
        let gradients = if self.double {
            let double = Adapted::new(self, weights.var_builder(DType::F64), DType::F64, false)?;
            let (_, expected) = double.backward()?;
            lora::utils::check_grads(double.adapter.var_map(), &expected, || double.loss())?;
            let (grads, expected) = (single.by_name(&grads), double.by_name(&expected));
            let mut most = 0f64;
            for (name, grad) in &grads {
                let difference = relative(grad, &expected[name])?;
                assert!(difference < GRADIENTS, "{name}: {difference:.1e}");
                most = most.max(difference);
            }
            format!("{most:.0e}")
        } else {
            lora::utils::check_grads(single.adapter.var_map(), &grads, || single.loss())?;
            "-".to_owned()
        };
        if self.flash {
            let flash = Adapted::new(self, weights.var_builder(DType::F32), DType::F32, true)?;
            let (other, other_grads) = flash.backward()?;
            // These two round queries, keys and values to F16.
            let half = matches!(self.name, "stable_diffusion" | "wuerstchen");
            let (outputs, gradients) = if half { (1e-3, 1e-2) } else { (OUTPUTS, GRADIENTS) };
            let difference = relative(&other, &output)?;
            assert!(difference < outputs, "flash attention: {difference:.1e}");
            let other_grads = flash.by_name(&other_grads);
            for (name, grad) in single.by_name(&grads) {
                // An expert without a token has none.
                if grad.abs()?.sum_all()?.to_scalar::<f32>()? > 0. {
                    let difference = relative(&other_grads[&name], &grad)?;
                    assert!(difference < gradients, "flash attention, {name}: {difference:.1e}");
                }
            }
        }
        if !REBUILT.contains(&self.name) {
            let chosen = self.chosen(&weights, &single.adapter)?;
            assert_eq!(relative(&chosen, &output)?, 0., "chosen among several");
        }
        single.adapter.eval()?;
        let evaluated = single.output()?;
        assert!(!evaluated.track_op(), "no graph in evaluation");
        let merged = single.adapter.merged(weights.var_builder(DType::F32))?;
        let served = (self.unmodified)(merged, false)?()?;
        let (eval, merged) = (relative(&evaluated, &output)?, relative(&served, &output)?);
        assert!(eval < OUTPUTS && merged < OUTPUTS, "eval {eval:.1e}, merged {merged:.1e}");
        let quantized = self.quantized(&weights)?;
        let (name, adapted) = (self.name, single.adapter.adapted().len());
        println!(
            "| {name} | {adapted} | {gradients} | {eval:.0e} | {merged:.0e} | {quantized:.0e} |"
        );
        Ok(())
    }

    /// The output of a model on `Adapters` that chooses this adapter.
    fn chosen(&self, weights: &Weights, adapter: &Adapter) -> lora::Result<Tensor> {
        let adapters = Adapters::new();
        let mut model =
            (self.copied)(adapters.var_builder(weights.var_builder(DType::F32)), false)?;
        model()?;
        adapters.add("adapter", adapter)?;
        Ok(adapters.choice("adapter")?.run_local(model)?)
    }

    /// The largest difference of the output and the gradients over quantised weights from those over the
    /// same weights dequantised.
    fn quantized(&self, weights: &Weights) -> lora::Result<f64> {
        let cpu = &Device::Cpu;
        let blocks = weights.quantized(self.dense)?;
        let dense = blocks.iter().map(|(name, w)| Ok((name.clone(), w.dequantize(cpu)?)));
        let dense = VarBuilder::from_tensors(dense.collect::<Result<_>>()?, DType::F32, cpu);
        let blocks = lora::gguf::var_builder(blocks, DType::F32, cpu);
        let quantized = Adapted::new(self, blocks, DType::F32, false)?;
        let dense = Adapted::new(self, dense, DType::F32, false)?;
        let (output, expected) = (quantized.output()?, dense.output()?);
        let mut most = relative(&output, &expected)?;
        let grads = quantized.by_name(&loss(&output)?.backward()?);
        for (name, expected) in dense.by_name(&loss(&expected)?.backward()?) {
            // In the rounded weights no token may take an expert.
            if expected.abs()?.sum_all()?.to_scalar::<f32>()? > 0. {
                most = most.max(relative(&grads[&name], &expected)?);
            }
        }
        assert!(most < QUANTIZED, "quantised: {most:.1e}");
        Ok(most)
    }
}

/// Models that each forward builds, to have an empty cache: `Adapters` knows the layers of a model that exists.
const REBUILT: [&str; 5] = ["based", "mimi", "mixtral", "recurrent_gemma", "stable_lm"];

/// A model with an adapter whose factors are random.
struct Adapted {
    adapter: Adapter,
    model: RefCell<Forward>,
}

impl Adapted {
    fn new(
        case: &Case,
        base: VarBuilder<'static>,
        dtype: DType,
        flash: bool,
    ) -> lora::Result<Self> {
        let adapter = Adapter::new(CFG).targets(case.targets);
        let model = (case.copied)(adapter.var_builder(base), flash)?;
        let new = Self { adapter, model: RefCell::new(model) };
        // Some build the model here, to have an empty cache.
        new.output()?;
        new.adapter.check()?;
        for (name, var) in new.adapter.var_map().data().lock().unwrap().iter() {
            var.set(&random(name, var.shape(), 0.2)?.to_dtype(dtype)?)?;
        }
        Ok(new)
    }

    fn output(&self) -> Result<Tensor> {
        self.model.borrow_mut()()
    }

    fn loss(&self) -> Result<Tensor> {
        loss(&self.output()?)
    }

    fn backward(&self) -> lora::Result<(Tensor, GradStore)> {
        let output = self.output()?;
        let grads = loss(&output)?.backward()?;
        let missing = lora::missing_grads(self.adapter.var_map(), &grads);
        assert!(missing.is_empty(), "no gradient: {missing:?}");
        Ok((output, grads))
    }

    fn by_name(&self, grads: &GradStore) -> HashMap<String, Tensor> {
        let vars = self.adapter.var_map().data().lock().unwrap();
        let grad =
            |(name, var): (&String, &candle::Var)| Some((name.clone(), grads.get(var)?.clone()));
        vars.iter().filter_map(grad).collect()
    }
}

/// A weighted sum, so that no output's gradient is the same as another's.
fn loss(output: &Tensor) -> Result<Tensor> {
    (output * random("loss", output.shape(), 1.)?.to_dtype(output.dtype())?)?.sum_all()
}

/// The largest difference relative to the largest value of `b`.
fn relative(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    let (difference, size) = (largest(&(a - &b)?)?, largest(&b)?);
    assert!(size > 0. && difference.is_finite(), "{difference} of {size}");
    Ok(difference / size)
}

/// A model's configuration from the keys of its config.json.
pub fn config<T: DeserializeOwned>(keys: Value) -> Result<T> {
    serde_json::from_value(keys).map_err(candle::Error::wrap)
}

pub fn forward(forward: impl FnMut() -> Result<Tensor> + 'static) -> Result<Forward> {
    Ok(Box::new(forward))
}

/// Token ids below 16, (batch, len).
pub fn ids(batch: u32, len: u32) -> Result<Tensor> {
    let ids: Vec<_> = (0..batch * len).map(|i| (7 * i + i / len + 3) % 16).collect();
    Tensor::from_vec(ids, (batch as usize, len as usize), &Device::Cpu)
}

/// Random values in the dtype of the weights.
pub fn input(shape: impl Into<Shape>, vb: &VarBuilder) -> Result<Tensor> {
    random("input", &shape.into(), 1.)?.to_dtype(vb.dtype())
}
