//! Initial factors that are a part of the base (`fixtures/initial.py`): the same part as PEFT's, the same training,
//! and a plain adapter of rank 2r in every file.

use crate::common::difference;
use crate::CPU;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Optimizer, VarBuilder, VarMap, SGD};
use lora::adapter::AdapterConfig;
use lora::formats::peft;
use lora::layers::InitLoraWeights;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::{Adapter, Bias, LoraConfig, LoraModule, LoraWeights, Strict};
use loralib as lora;
use std::path::PathBuf;
use std::sync::Arc;

const CASES: [&str; 5] = ["pissa", "pissa_rslora", "pissa_dora", "pissa_gpt2", "olora"];
const CFG: LoraConfig = LoraConfig { r: 2, lora_alpha: 3., ..LoraConfig::DEFAULT };

struct Case {
    config: AdapterConfig,
    tensors: StateDict,
}

impl Case {
    fn new(name: &str) -> lora::Result<Self> {
        let folder =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/initial").join(name);
        let config = Adapter::from_peft_config(&folder)?.config();
        let tensors = lora::read_state_dict(folder.join("model.safetensors"), &CPU)?.tensors;
        Ok(Self { config, tensors })
    }

    fn of(&self, prefix: &str) -> StateDict {
        let own =
            |(name, t): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.into(), t.clone()));
        self.tensors.iter().filter_map(own).collect()
    }
}

struct Model {
    vars: VarMap,
    q: lora::Linear,
    o: lora::Linear,
}

impl Model {
    fn new(case: &Case) -> Result<Self> {
        let vars = VarMap::new();
        let base =
            VarBuilder::from_tensors(case.of("base.").into_iter().collect(), DType::F32, &CPU);
        let vb = lora::var_builder(base, &vars, Bias::None);
        let layer = |name: &str| {
            let vb = vb.pp(name);
            let base = candle_nn::Linear::new(
                vb.get_unchecked("weight")?,
                Some(vb.get_unchecked("bias")?),
            );
            lora::Linear::new(base, case.config.lora, vb)
        };
        let (q, o) = (layer("q")?, layer("o")?);
        Ok(Self { vars, q, o })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.o.forward(&self.q.forward(x)?.tanh()?)
    }

    /// As `initial.py` trains.
    fn train(&self, case: &Case) -> lora::Result<()> {
        let (x, t) = (&case.tensors["x"], &case.tensors["t"]);
        let mut sgd = SGD::new(lora::mark_only_lora_as_trainable(&self.vars, Bias::None)?, 0.05)?;
        for _ in 0..5 {
            sgd.backward_step(&candle_nn::loss::mse(&self.forward(x)?, t)?)?;
        }
        Ok(())
    }

    fn layers(&self) -> [(&str, &lora::Linear); 2] {
        [("q", &self.q), ("o", &self.o)]
    }
}

#[test]
fn a_new_layer_equals_its_base_and_starts_from_peft_s_part_of_it() -> lora::Result<()> {
    for name in CASES {
        let case = Case::new(name)?;
        let (model, base, left) = (Model::new(&case)?, case.of("base."), case.of("left."));
        for (path, layer) in model.layers() {
            let w = &base[&format!("{path}.weight")];
            let apart = difference(&layer.merged_weight()?, w)?;
            assert!(apart < 2e-6, "{name}: {path} is {apart} from its base");
            let (Some(a), Some(b)) = (layer.lora_a(), layer.lora_b()) else {
                panic!("{name}: {path} has no factors")
            };
            let mut part = (b.matmul(a)? * layer.scaling())?;
            if case.config.lora.fan_in_fan_out {
                part = part.t()?;
            }
            let apart = difference(&(w - part)?, &left[&format!("{path}.weight")])?;
            assert!(apart < 1e-5, "{name}: what is left of {path} is {apart} from PEFT's");
        }
    }
    Ok(())
}

#[test]
fn training_agrees_with_peft_and_leaves_the_initial_factors_alone() -> lora::Result<()> {
    for name in CASES {
        let case = Case::new(name)?;
        let (model, trained) = (Model::new(&case)?, case.of("trained."));
        let initial = |model: &Model| -> lora::Result<StateDict> {
            let mut all = lora::lora_state_dict(&model.vars, Bias::None)?;
            all.retain(|name, _| name.contains("initial"));
            Ok(all)
        };
        let before = initial(&model)?;
        assert_eq!(before.len(), 4, "{name}");
        model.train(&case)?;
        for (path, layer) in model.layers() {
            let peft = &trained[&format!("{path}.weight")];
            let apart = difference(&layer.merged_weight()?, peft)?;
            assert!(apart < 5e-6, "{name}: {path} is {apart} from PEFT's");
        }
        for (tensor, before) in before {
            assert_eq!(difference(&initial(&model)?[&tensor], &before)?, 0., "{name}: {tensor}");
        }
    }
    Ok(())
}

#[test]
fn every_file_merges_to_the_trained_weights() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    for name in CASES {
        let case = Case::new(name)?;
        let model = Model::new(&case)?;
        model.train(&case)?;
        let (base, adapter) = (case.of("base."), lora::lora_state_dict(&model.vars, Bias::None)?);
        let agrees = |what: &str, weights: &LoraWeights| -> lora::Result<()> {
            let merged = merge_into(&base, weights)?;
            for (path, layer) in model.layers() {
                let apart =
                    difference(&merged[&format!("{path}.weight")], &layer.merged_weight()?)?;
                assert!(apart < 2e-6, "{name}: {path} of {what} is {apart} apart");
            }
            Ok(())
        };
        let weights = LoraWeights::new(&case.config, adapter.clone())?;
        agrees("the state dict", &weights)?;

        let file = dir.path().join(name);
        lora::save_state_dict(&adapter, &case.config, &file)?;
        let read = lora::read_state_dict(&file, &CPU)?;
        let read = LoraWeights::new(read.config.unwrap_or_default(), read.tensors)?;
        agrees("this crate's file", &read)?;

        let folder = dir.path().join(format!("{name}_peft"));
        peft::save(&folder, &weights)?;
        let read = peft::load(&folder, &CPU)?;
        agrees("PEFT's folder", &read)?;
        let (config, r) = (read.config(), case.config.lora.r);
        assert_eq!(config.lora_config("q").r, 2 * r, "{name}");
        let apart = config.lora_config("q").scaling() - case.config.lora.scaling();
        assert!(apart.abs() < 1e-6, "{name}: the scaling is {apart} apart");

        let loaded = Adapter::load(&file, &CPU)?;
        assert_eq!(loaded.config().lora_config("o").r, 2 * r, "{name}");
        agrees("a loaded adapter", &loaded.weights()?)?;
    }
    Ok(())
}

#[test]
fn a_saved_run_goes_on_to_the_bit() -> lora::Result<()> {
    let (dir, case) = (tempfile::tempdir()?, Case::new("pissa")?);
    let (model, again) = (Model::new(&case)?, Model::new(&case)?);
    model.train(&case)?;
    let file = dir.path().join("run.safetensors");
    lora::save_state_dict(&lora::lora_state_dict(&model.vars, Bias::None)?, &case.config, &file)?;
    // Other initial factors than the file's, as of another machine.
    for var in again.vars.all_vars() {
        var.set(&var.zeros_like()?)?;
    }
    let report = lora::load_checkpoint(&file, &again.vars, &case.config, Strict::Yes)?;
    assert_eq!(report.loaded.len(), 8);
    model.train(&case)?;
    again.train(&case)?;
    for ((path, one), (_, other)) in model.layers().into_iter().zip(again.layers()) {
        assert_eq!(difference(&one.merged_weight()?, &other.merged_weight()?)?, 0., "{path}");
    }
    Ok(())
}

#[test]
fn a_quantised_base_stays_as_it_is() -> lora::Result<()> {
    let w = crate::common::rnd(3, &[16, 32], DType::F32)?.to_device(&CPU)?;
    let blocks = Arc::new(QTensor::quantize(&w, GgmlDType::Q4_0)?);
    let w = blocks.dequantize(&CPU)?;
    for init_lora_weights in
        [InitLoraWeights::Pissa, InitLoraWeights::PissaNiter(4), InitLoraWeights::Olora]
    {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU);
        let cfg = LoraConfig { init_lora_weights, ..CFG };
        let layer = lora::Linear::quantized(blocks.clone(), None, cfg, vb)?;
        let apart = difference(&layer.merged_weight()?, &w)?;
        assert!(apart < 2e-6, "{init_lora_weights:?}: {apart}");
        let x = crate::common::rnd(4, &[3, 32], DType::F32)?.to_device(&CPU)?;
        let apart = difference(&layer.forward(&x)?, &x.matmul(&w.t()?)?)?;
        assert!(apart < 1e-5, "{init_lora_weights:?}: {apart}");
    }
    Ok(())
}

#[test]
fn what_has_no_such_part_is_an_error_that_leaves_no_variable() -> lora::Result<()> {
    let pissa = LoraConfig { init_lora_weights: InitLoraWeights::Pissa, ..CFG };
    let base = |value: f32| {
        candle_nn::Linear::new(Tensor::full(value, (4, 3), &CPU).expect("a tensor"), None)
    };
    let vars = VarMap::new();
    let vb = || VarBuilder::from_varmap(&vars, DType::F32, &CPU).pp("q");
    let message = |made: Result<lora::Linear>| made.map(drop).expect_err("an error").to_string();
    for (made, reason) in [
        (
            lora::Linear::new(base(1.), LoraConfig { r: 4, ..pissa }, vb()),
            "r is 4, expected at most 3",
        ),
        (
            lora::Linear::new(base(1.), LoraConfig { lora_alpha: 0., ..pissa }, vb()),
            "the scaling is 0",
        ),
        (lora::Linear::new(base(f32::NAN), pissa, vb()), "not finite"),
        (
            lora::linear(3, 4, pissa, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU)),
            "is a variable",
        ),
    ] {
        let message = message(made);
        assert!(message.contains(reason), "{message}");
    }
    assert!(vars.all_vars().is_empty());
    for made in [
        lora::merged_linear(3, 4, &[true, false], pissa, vb().pp("qkv")).map(drop),
        lora::conv1d(3, 4, 1, Default::default(), pissa, vb().pp("conv")).map(drop),
    ] {
        let message = made.expect_err("an error").to_string();
        assert!(message.contains("does not support init_lora_weights"), "{message}");
    }
    Ok(())
}

/// With one input the part is all of W, or with OLoRA three times W, by the scaling: PEFT drops or doubles it.
#[test]
fn dropout_leaves_out_what_is_subtracted() -> lora::Result<()> {
    for (init_lora_weights, use_dora, part) in [
        (InitLoraWeights::Pissa, false, 1.),
        (InitLoraWeights::Olora, false, 3.),
        (InitLoraWeights::Pissa, true, 1.),
    ] {
        let w = Tensor::new(&[[2f32], [-1.], [0.5]], &CPU)?;
        let cfg = LoraConfig {
            r: 1,
            lora_alpha: 3.,
            lora_dropout: 0.5,
            init_lora_weights,
            use_dora,
            ..LoraConfig::DEFAULT
        };
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU);
        let mut layer = lora::Linear::new(candle_nn::Linear::new(w.clone(), None), cfg, vb)?;
        let y = layer.forward(&Tensor::ones((64, 1), DType::F32, &CPU)?)?;
        let (mut dropped, mut kept) = (0, 0);
        for row in y.to_vec2::<f32>()? {
            let is = |factor: f32| {
                row.iter().zip([2., -1., 0.5]).all(|(y, w)| (y - factor * w).abs() < 1e-5)
            };
            dropped += usize::from(is(1. - part));
            kept += usize::from(is(1. + part));
        }
        assert_eq!(dropped + kept, 64, "{init_lora_weights:?}, use_dora {use_dora}");
        assert!(dropped > 8 && kept > 8, "{dropped} {kept}");
        layer.eval()?;
        let y = layer.forward(&Tensor::ones((1, 1), DType::F32, &CPU)?)?;
        assert!(difference(&y, &w.t()?)? < 1e-6, "{init_lora_weights:?}");
    }
    Ok(())
}

/// The configuration of a file does not say how the adapter began, the tensors do.
#[test]
fn initial_factors_count_whatever_the_options_say() -> lora::Result<()> {
    let case = Case::new("pissa")?;
    let model = Model::new(&case)?;
    model.train(&case)?;
    let (adapter, plain) = (
        lora::lora_state_dict(&model.vars, Bias::None)?,
        LoraConfig { init_lora_weights: InitLoraWeights::Uniform, ..case.config.lora },
    );
    let mut all = case.of("base.");
    all.extend(adapter.clone());
    let layer = |all: &StateDict| {
        let vb = VarBuilder::from_tensors(all.clone().into_iter().collect(), DType::F32, &CPU);
        lora::linear(6, 8, plain, vb.pp("q"))
    };
    let apart = difference(&layer(&all)?.merged_weight()?, &model.q.merged_weight()?)?;
    assert!(apart < 1e-6, "{apart}");
    all.remove("q.lora_B_initial");
    let message = layer(&all).expect_err("an error").to_string();
    assert!(message.contains("q.lora_B_initial"), "{message}");

    // Factors without their own initial ones, or the other way round.
    let half = |initial: bool| -> StateDict {
        let own = adapter.iter().filter(|(name, _)| initial || !name.contains("initial"));
        own.map(|(name, t)| (name.clone(), t.clone())).collect()
    };
    let other = Model::new(&Case {
        config: AdapterConfig { lora: plain, ..case.config.clone() },
        tensors: case.tensors.clone(),
    })?;
    for (vars, tensors, reason) in [
        (&model.vars, half(false), "without init_lora_weights"),
        (&other.vars, half(true), "with the init_lora_weights"),
    ] {
        for strict in [Strict::Yes, Strict::No] {
            let message = match lora::load_state_dict(vars, &tensors, strict) {
                Ok(report) => panic!("loaded {report:?}"),
                Err(error) => error.to_string(),
            };
            assert!(message.contains("initial") && message.contains(reason), "{message}");
        }
    }
    Ok(())
}
