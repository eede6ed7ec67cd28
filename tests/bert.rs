//! The example's BERT agrees with transformers, and trains the selected variables only.

#[path = "../examples/classify/bert.rs"]
mod bert;
#[path = "../examples/classify/classifier.rs"]
mod classifier;
mod common;
#[allow(dead_code)]
#[path = "../examples/classify/config.rs"]
mod config;
#[path = "../examples/classify/gelu.rs"]
mod gelu;
#[path = "../examples/classify/names.rs"]
mod names;
#[path = "../examples/common/nn/mod.rs"]
mod nn;

use bert::{Adapt, Bert};
use candle_core::{DType, Tensor};
use candle_nn::{VarBuilder, VarMap};
use classifier::{Classifier, Pooling};
use common::{device, difference, rnd};
use config::Config;
use lora::{Bias, LoraConfig, LoraModule, StateDict, Trainable};
use loralib as lora;
use std::collections::HashSet;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const LABELS: usize = 3;

struct Fixture {
    config: Config,
    tensors: StateDict,
    ids: Tensor,
    real: Tensor,
    hidden: Tensor,
}

impl Fixture {
    fn read(name: &str) -> Result<Self> {
        let folder = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
        let read = |file| lora::read_state_dict(format!("{folder}/{file}"), &device());
        let mut expected = read("expected.safetensors")?.tensors;
        let mut part = |name| expected.remove(name).unwrap();
        let config = Config::from_json(&std::fs::read_to_string(format!("{folder}/config.json"))?)?;
        let (ids, real, hidden) = (part("ids"), part("real"), part("hidden"));
        let tensors = names::own_names(read("model.safetensors")?.tensors, &config)?;
        Ok(Self { config, tensors, ids, real, hidden })
    }

    fn base(&self) -> VarBuilder<'static> {
        let tensors = self.tensors.clone().into_iter().collect();
        VarBuilder::from_tensors(tensors, DType::F32, &device())
    }

    fn classifier(&self, targets: &str, vars: &VarMap, trainable: Trainable) -> Result<Classifier> {
        let vb = lora::var_builder(self.base(), vars, trainable);
        Ok(Classifier::new(&self.config, &adapt(targets), LABELS, Pooling::Mean, vb)?)
    }

    /// The difference of the hidden states of real tokens from those of transformers.
    fn error(&self, model: &Bert) -> Result<f64> {
        let hidden = model.forward(&self.ids, Some(&self.real))?;
        let real = self.real.unsqueeze(2)?;
        Ok(difference(&hidden.broadcast_mul(&real)?, &self.hidden.broadcast_mul(&real)?)?)
    }
}

fn adapt(targets: &str) -> Adapt {
    let lora = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    Adapt { lora, targets: targets.split(',').map(str::to_owned).collect() }
}

#[test]
fn hidden_states_agree_with_transformers() -> Result<()> {
    for name in ["bert", "roberta"] {
        let fixture = Fixture::read(name)?;
        let vars = VarMap::new();
        for (how, adapt, vb) in [
            ("plain", Adapt::default(), fixture.base()),
            (
                "adapted",
                adapt("query,key,value,dense"),
                lora::var_builder(fixture.base(), &vars, Bias::None),
            ),
            (
                "trained",
                Adapt::default(),
                lora::var_builder(fixture.base(), &VarMap::new(), Trainable::all_parameters()),
            ),
        ] {
            let mut model = Bert::new(&fixture.config, &adapt, vb)?;
            let d = fixture.error(&model)?;
            assert!(d < 1e-5, "{name}, {how}: {d}");
            model.eval()?;
            let d = fixture.error(&model)?;
            assert!(d < 1e-5, "{name}, {how}, in evaluation: {d}");
        }
        // Six linear layers each.
        assert_eq!(vars.all_vars().len(), fixture.config.num_hidden_layers * 12);
    }
    Ok(())
}

#[test]
fn prefixes_and_old_names_are_read() -> Result<()> {
    let Fixture { config, tensors, .. } = Fixture::read("bert")?;
    let named = |rename: &dyn Fn(&str) -> String| {
        let renamed = tensors.iter().map(|(name, t)| (rename(name), t.clone())).collect();
        names::own_names(renamed, &config).map(|own| own.into_keys().collect::<Vec<_>>())
    };
    let own: Vec<_> = tensors.keys().cloned().collect();
    assert_eq!(named(&|name| name.to_owned())?, own);
    assert_eq!(named(&|name| format!("bert.{name}"))?, own);
    let older = |name: &str| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")
    };
    assert_eq!(named(&older)?, own);
    let error = named(&|name| name.replace("layer.1", "layer.7")).unwrap_err().to_string();
    assert!(error.contains("encoder.layer.7"), "{error}");
    Ok(())
}

/// The variables without a gradient, and the number of gradients that belong to no variable.
fn trained(fixture: &Fixture, model: &Classifier, vars: &VarMap) -> Result<(Vec<String>, usize)> {
    let logits = model.forward(&fixture.ids, Some(&fixture.real))?;
    let targets = Tensor::new(&[0u32, 2], &device())?;
    let grads = candle_nn::loss::cross_entropy(&logits, &targets)?.backward()?;
    let ids: HashSet<_> = vars.all_vars().iter().map(|var| var.id()).collect();
    let others = grads.get_ids().filter(|id| !ids.contains(id)).count();
    Ok((lora::missing_grads(vars, &grads), others))
}

#[test]
fn only_trained_variables_get_gradients() -> Result<()> {
    let fixture = Fixture::read("bert")?;
    let everything = Trainable::all_parameters().and("classifier");
    for (targets, trainable, expected) in [
        ("", Bias::None.and("classifier"), 2),
        ("query,value", Bias::None.and("classifier"), 2 + 8),
        ("query,value", Bias::LoraOnly.and("classifier"), 2 + 8 + 4),
        ("", everything, 2 + fixture.tensors.len()),
    ] {
        let vars = VarMap::new();
        let model = fixture.classifier(targets, &vars, trainable)?;
        assert_eq!(vars.all_vars().len(), expected, "{targets}");
        assert_eq!(trained(&fixture, &model, &vars)?, (vec![], 0), "{targets}, {expected}");
    }
    Ok(())
}

/// More values than a vector has lanes, and not a multiple of them.
const N: usize = 42;

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let (x, g) = (rnd(1, &[2, 5, N], DType::F32)?, rnd(2, &[2, 5, N], DType::F32)?);
    let (y, z) = (rnd(3, &[2, 5, N], DType::F32)?, rnd(4, &[2, 5, N], DType::F32)?);
    let vb = VarBuilder::zeros(DType::F32, &device());
    let weight = rnd(5, &[N], DType::F32)?;
    let frozen = [("weight".to_owned(), weight.clone()), ("bias".to_owned(), weight)];
    let frozen = VarBuilder::from_tensors(frozen.into(), vb.dtype(), &device());
    let norm = nn::norm::Norm::new(N, 1e-5, frozen)?;
    let mask = Tensor::new(&[[[[0f32, 0., 0., 0., -1e9]]]], &device())?;
    let mask = Some(&mask);
    type Op<'a> = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor> + 'a>;
    let ops: [(&str, Op); 5] = [
        ("gelu", Box::new(|x| gelu::gelu_erf(&(x * 4.)?))),
        ("norm", Box::new(|x| norm.forward(x))),
        ("query", Box::new(|x| nn::attention::attention(x, &y, &z, mask, 2))),
        ("key", Box::new(|x| nn::attention::attention(&y, x, &z, mask, 2))),
        ("value", Box::new(|x| nn::attention::attention(&y, &z, x, mask, 2))),
    ];
    for (name, op) in ops {
        let value = |x: &Tensor| (op(x)? * &g)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>();
        let var = candle_core::Var::from_tensor(&x)?;
        let loss = (op(var.as_tensor())? * &g)?.sum_all()?;
        let grad = loss.backward()?.remove(var.as_tensor()).unwrap();
        let along = rnd(6, &[2, 5, N], DType::F32)?;
        let step = 1e-2;
        let slope =
            (value(&(&x + (&along * step)?)?)? - value(&(&x - (&along * step)?)?)?) / (2. * step);
        let expected = (grad * along)?.sum_all()?.to_scalar::<f32>()?;
        let (expected, size) = (f64::from(expected), f64::from(expected).abs().max(1.));
        assert!((slope - expected).abs() < 1e-2 * size, "{name}: {expected}, numerically {slope}");
    }
    Ok(())
}

/// F32 on the CPU has its own kernels; F64 uses candle's operations.
#[test]
fn kernels_agree_with_candle() -> Result<()> {
    type Op = fn(DType, &Tensor) -> candle_core::Result<Tensor>;
    /// Heads of 21 values, and more tokens than a vector has lanes.
    const DIMS: [usize; 3] = [3, 19, N];
    fn masked(dtype: DType, q: &Tensor, mask: Option<Tensor>) -> candle_core::Result<Tensor> {
        let (k, v) = (rnd(3, &DIMS, dtype)?, rnd(4, &DIMS, dtype)?);
        let mask = mask.map(|mask| mask.to_dtype(dtype)).transpose()?;
        // Each operand depends on the variable.
        nn::attention::attention(q, &(&k + q)?, &(&v - q)?, mask.as_ref(), 2)
    }
    let ops: [(&str, Op); 9] = [
        ("gelu", |_, x| gelu::gelu_erf(&(x * 4.)?)),
        ("norm", |dtype, x| {
            let (weight, bias) = (rnd(5, &[N], dtype)?, rnd(6, &[N], dtype)?);
            // candle's fused norm has no F64: a variable selects the composed one.
            let weight = match dtype {
                DType::F64 => candle_core::Var::from_tensor(&weight)?.into_inner(),
                _ => weight,
            };
            let tensors = [("weight".to_owned(), weight), ("bias".to_owned(), bias)];
            let vb = VarBuilder::from_tensors(tensors.into(), dtype, &device());
            nn::norm::Norm::new(N, 1e-5, vb)?.forward(x)
        }),
        ("attention", |dtype, x| masked(dtype, x, None)),
        ("attention with padding", |dtype, x| {
            let last = |i| if i < 15 { 0f32 } else { -1e9 };
            let row = |sentence| (0..19).map(move |i| if sentence == 1 { last(i) } else { 0. });
            let mask = Tensor::from_iter((0..3).flat_map(row), &device())?;
            masked(dtype, x, Some(mask.reshape((3, 1, 1, 19))?))
        }),
        ("causal attention", |dtype, x| {
            let seen = |i, j| if j <= i { 0. } else { f32::NEG_INFINITY };
            let mask = (0..19).flat_map(|i| (0..19).map(move |j| seen(i, j)));
            masked(dtype, x, Some(Tensor::from_iter(mask, &device())?.reshape((19, 19))?))
        }),
        ("a mask with one value per token", |dtype, x| {
            masked(dtype, x, Some((rnd(7, &[19, 1], dtype)? * 4.)?))
        }),
        ("a mask per head", |dtype, x| {
            masked(dtype, x, Some((rnd(7, &[1, 2, 19, 19], dtype)? * 4.)?))
        }),
        ("a mask per sentence", |dtype, x| {
            masked(dtype, x, Some((rnd(7, &[3, 1, 19, 19], dtype)? * 4.)?))
        }),
        ("attention of strided views", |dtype, x| {
            let all = Tensor::cat(&[x, &rnd(3, &DIMS, dtype)?, &rnd(4, &DIMS, dtype)?], 2)?;
            let part = |i| all.narrow(2, i * N, N);
            nn::attention::attention(&part(0)?, &part(1)?, &part(2)?, None, 2)
        }),
    ];
    for (name, op) in ops {
        let [fast, slow] = [DType::F32, DType::F64].map(|dtype| {
            let x = candle_core::Var::from_tensor(&rnd(1, &DIMS, dtype)?)?;
            let y = op(dtype, x.as_tensor())?;
            let grads = (&y * rnd(2, &DIMS, dtype)?)?.sum_all()?.backward()?;
            Ok::<_, candle_core::Error>((y, grads.get(x.as_tensor()).cloned()))
        });
        let ((y, gx), (expected, expected_gx)) = (fast?, slow?);
        let (gx, expected_gx) = (gx.ok_or("no gradient")?, expected_gx.ok_or("no gradient")?);
        for (what, a, b) in [("value", y, expected), ("gradient", gx, expected_gx)] {
            let d = difference(&a.to_dtype(DType::F64)?, &b)?;
            assert!(d < 2e-5, "{name}: the {what}s are {d} apart");
        }
    }
    Ok(())
}

#[test]
fn attention_propagates_nan_and_checks_shapes() -> Result<()> {
    let x = |dims: &[usize]| rnd(1, dims, DType::F32);
    let (q, nan) = (x(&[1, 3, 6])?, Tensor::full(f32::NAN, (1, 3, 6), &device())?);
    for (q, mask) in [(&nan, 0.), (&q, f32::NEG_INFINITY)] {
        let mask = Tensor::full(mask, (3, 3), &device())?;
        let y = nn::attention::attention(q, &x(&[1, 3, 6])?, &x(&[1, 3, 6])?, Some(&mask), 2)?;
        assert!(common::values(&y)?.iter().all(|y| y.is_nan()));
    }
    for (k, heads) in [(&[1, 3, 6], 0), (&[1, 3, 6], 4), (&[3, 1, 6], 2), (&[1, 0, 6], 2)] {
        let error = nn::attention::attention(&q, &x(k)?, &q, None, heads).unwrap_err();
        assert!(error.to_string().contains("attention: "), "{error}");
    }
    Ok(())
}
