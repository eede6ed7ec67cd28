//! Twenty steps of an adapter that PEFT saved, beside PEFT's own (`fixtures/steps.py`).

use crate::common::difference;
use crate::CPU;
use candle_core::{DType, Module, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, Optimizer, ParamsAdamW};
use lora::nn::{conv1d, conv2d, embedding, linear, linear_no_bias, Embedding, Linear, VarBuilder};
use lora::train::AdamW;
use lora::utils::{read_state_dict, StateDict};
use lora::{Adapter, Result};
use loralib as lora;
use std::path::{Path, PathBuf};

const CASES: [&str; 15] = [
    "linear",
    "linear_dora",
    "embedding",
    "embedding_dora",
    "padding",
    "conv1d",
    "conv1d_dora",
    "conv2d",
    "conv2d_dora",
    "conv2d_wide",
    "linear_bias",
    "conv2d_bias",
    "tokens_tied",
    "tokens_untied",
    "experts",
];

fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/steps").join(case)
}

fn of(case: &str) -> Result<StateDict> {
    let all = read_state_dict(folder("expected.safetensors"), &CPU)?.tensors;
    let own =
        |(name, t): (String, Tensor)| Some((name.strip_prefix(&format!("{case}."))?.to_owned(), t));
    Ok(all.into_iter().filter_map(own).collect())
}

/// A table, a layer and a head.
struct TinyLm(Embedding, Linear, Linear);

impl Module for TinyLm {
    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        self.2.forward(&self.1.forward(&self.0.forward(ids)?)?.tanh()?)
    }
}

impl TinyLm {
    /// A tied head has the table's tensor, or reads its own name.
    fn new(reads_head: bool, vb: VarBuilder) -> Result<Self> {
        let table = embedding(9, 6, vb.pp("model.embed_tokens"))?;
        let layer = linear(6, 6, vb.pp("model.q_proj"))?;
        let head = match reads_head {
            true => linear_no_bias(6, 9, vb.pp("lm_head"))?,
            false => Linear::new(table.embeddings().clone(), None),
        };
        Ok(Self(table, layer, head))
    }
}

/// A layer for each projection of each expert.
struct Experts(Vec<[Linear; 3]>);

impl Module for Experts {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let outputs = self.0.iter().enumerate().map(|(e, [gate, up, down])| {
            let hidden = (gate.forward(x)?.silu()? * up.forward(x)?)?;
            down.forward(&hidden)? / (e + 1) as f64
        });
        let outputs = outputs.collect::<candle_core::Result<Vec<_>>>()?;
        outputs[1..].iter().try_fold(outputs[0].clone(), |sum, y| sum + y)
    }
}

impl Experts {
    fn new(vb: VarBuilder) -> Result<Self> {
        let expert = |e: usize| {
            let layer = |ins, outs, name| linear_no_bias(ins, outs, vb.pp(e).pp(name));
            Ok([layer(6, 5, "gate_proj")?, layer(6, 5, "up_proj")?, layer(5, 6, "down_proj")?])
        };
        Ok(Self((0..3).map(expert).collect::<Result<_>>()?))
    }
}

fn layer(case: &str, vb: VarBuilder) -> Result<Box<dyn Module>> {
    if case == "experts" {
        return Ok(Box::new(Experts::new(vb.pp("mlp.experts"))?));
    }
    if case.starts_with("tokens") {
        return Ok(Box::new(TinyLm::new(case == "tokens_untied", vb)?));
    }
    let vb = vb.pp("layer");
    let padding = Conv2dConfig { padding: 1, stride: 2, ..Default::default() };
    Ok(match case.trim_end_matches("_dora").trim_end_matches("_bias") {
        "linear" => Box::new(linear(6, 5, vb)?),
        "embedding" => Box::new(embedding(9, 5, vb)?),
        "padding" => Box::new(embedding(9, 5, vb)?.with_padding_idx(2)?),
        "conv1d" => {
            Box::new(conv1d(4, 6, 3, Conv1dConfig { padding: 1, ..Default::default() }, vb)?)
        }
        "conv2d" => Box::new(conv2d(4, 6, 3, padding, vb)?),
        "conv2d_wide" => Box::new(conv2d(3, 4, 5, Default::default(), vb)?),
        other => panic!("{other}"),
    })
}

/// Trains an adapter, which is saved as PEFT's after the last step.
fn trains_as_peft(case: &str, adapter: &Adapter) -> Result<()> {
    let fixture = of(case)?;
    let base = fixture
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("base.")?.to_owned(), t.clone())));
    let base = VarBuilder::from_tensors(base.collect(), DType::F64, &CPU);
    let layer = layer(case, adapter.var_builder(base))?;
    adapter.check()?;
    adapter.train()?;
    let params = ParamsAdamW { lr: 0.05, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let mut opt = AdamW::named(adapter.named_vars()?, params)?;
    let losses = fixture["losses"].to_vec1::<f64>()?;
    for (step, expected) in losses.into_iter().enumerate() {
        let loss = (layer.forward(&fixture["x"])? - &fixture["y"])?.sqr()?.mean_all()?;
        let value = loss.to_scalar::<f64>()?;
        assert!((value - expected).abs() < 1e-6 * expected, "{case} {step}: {value} {expected}");
        opt.step(&loss.backward()?)?;
    }
    let dir = tempfile::tempdir()?;
    adapter.save_pretrained(dir.path())?;
    assert_peft_s(case, &fixture, dir.path())?;
    // And through this crate's own file.
    let own = dir.path().join("own.safetensors");
    adapter.save(&own)?;
    let again = Adapter::load(&own, &CPU)?;
    again.save_pretrained(dir.path().join("again"))?;
    assert_peft_s(case, &fixture, &dir.path().join("again"))?;
    for (name, var) in adapter.named_vars()? {
        assert_eq!(again.named_vars()?[&name].dims(), var.dims(), "{case} {name}");
    }
    for path in [&own as &Path, dir.path()] {
        let before = adapter.state_dict()?;
        adapter.named_vars()?.values().try_for_each(|var| var.set(&var.zeros_like()?))?;
        assert!(adapter.restore(path)?.missing.is_empty());
        for (name, tensor) in adapter.state_dict()? {
            assert_eq!(difference(&tensor, &before[&name])?, 0., "{case} {name}");
        }
    }
    Ok(())
}

/// The folder has PEFT's keys and shapes, and its values after the last step.
fn assert_peft_s(case: &str, fixture: &StateDict, dir: &Path) -> Result<()> {
    let saved = read_state_dict(dir.join("adapter_model.safetensors"), &CPU)?.tensors;
    let after = fixture.iter().filter_map(|(name, t)| Some((name.strip_prefix("after.")?, t)));
    let after: Vec<_> = after.collect();
    assert_eq!(saved.len(), after.len(), "{case}");
    for (key, expected) in after {
        let ours = &saved[key];
        assert_eq!(ours.dims(), expected.dims(), "{case} {key}");
        let apart = difference(ours, expected)?;
        assert!(apart < 1e-6, "{case} {key}: {apart}");
    }
    Ok(())
}

#[test]
fn an_adapter_of_peft_s_trains_as_there() -> Result<()> {
    for case in CASES {
        trains_as_peft(case, &Adapter::load(folder(case), &CPU)?)?;
    }
    Ok(())
}

/// A new adapter has PEFT's parameters, and is restored from PEFT's file.
#[test]
fn a_new_adapter_of_peft_s_configuration_trains_as_there() -> Result<()> {
    for case in CASES {
        let adapter = Adapter::from_peft_config(folder(case))?;
        let fixture = of(case)?;
        let base = fixture
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix("base.")?.to_owned(), t.clone())));
        let base = VarBuilder::from_tensors(base.collect(), DType::F64, &CPU);
        let _layer = layer(case, adapter.var_builder(base))?;
        let dims = |name: &str| Ok::<_, lora::Error>(adapter.named_vars()?[name].dims().to_vec());
        if let "conv2d" = case {
            assert_eq!(dims("layer.lora_A")?, [2, 4, 3, 3]);
            assert_eq!(dims("layer.lora_B")?, [6, 2, 1, 1]);
        }
        assert!(adapter.restore(folder(case))?.missing.is_empty());
        trains_as_peft(case, &adapter)?;
    }
    Ok(())
}

/// A kernel of several groups has loralib's factors: PEFT's have no place in it.
#[test]
fn a_new_grouped_convolution_has_loralib_s_factors() -> Result<()> {
    let adapter = Adapter::from_peft_config(folder("conv2d"))?;
    let weight = Tensor::ones((4, 2, 3, 3), DType::F32, &CPU)?;
    let base = [("layer.weight".to_owned(), weight)].into();
    let vb = adapter.var_builder(VarBuilder::from_tensors(base, DType::F32, &CPU)).pp("layer");
    let groups = Conv2dConfig { groups: 2, ..Default::default() };
    let layer = lora::nn::conv2d_no_bias(4, 4, 3, groups, vb)?;
    adapter.check()?;
    assert_eq!(layer.lora_a().unwrap().dims(), [6, 12]);
    Ok(())
}

#[test]
fn kernels_pass_through_the_functions_of_state_dicts() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapter.safetensors");
    let cfg = lora::LoraConfig { r: 2, lora_alpha: 3., conv_kernels: true, ..Default::default() };
    let vars = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let conv = lora::conv2d(4, 6, 3, Default::default(), cfg, vb.pp("c"))?;
    assert_eq!(conv.lora_a().unwrap().dims(), [2, 4, 3, 3]);
    for (name, var) in vars.data().lock().unwrap().iter() {
        if name.ends_with("lora_B") {
            var.set(&crate::common::randn(var.dims(), DType::F32, &CPU)?)?;
        }
    }
    let state = lora::lora_state_dict(&vars, lora::Bias::None)?;
    // Kernels tell the kind.
    lora::save_state_dict(&state, cfg, &path)?;
    let before = conv.lora_b().unwrap().copy()?;
    vars.data().lock().unwrap()["c.lora_B"].set(&before.zeros_like()?)?;
    let report = lora::load_checkpoint(&path, &vars, cfg, lora::utils::Strict::Yes)?;
    assert_eq!(report.loaded.len(), 2);
    assert_eq!(difference(conv.lora_b().unwrap(), &before)?, 0.);
    let other = lora::LoraConfig { r: 3, ..cfg };
    let error = lora::LoraWeights::new(other, state.clone()).unwrap_err().to_string();
    for word in ["c.lora_", "rank is 2", "r = 3"] {
        assert!(error.contains(word), "{error}");
    }
    let weights = lora::LoraWeights::new(cfg, state)?;
    let base = [("c.weight".to_owned(), conv.weight().clone())].into();
    let merged = lora::merge::merge_into(&base, &weights)?;
    assert!(difference(&merged["c.weight"], conv.into_merged()?.weight())? < 1e-6);
    lora::formats::peft::save(dir.path(), &weights)?;
    let saved = read_state_dict(dir.path().join("adapter_model.safetensors"), &CPU)?.tensors;
    assert_eq!(saved["base_model.model.c.lora_A.weight"].dims(), [2, 4, 3, 3]);
    Ok(())
}

#[test]
fn a_sum_of_peft_s_convolutions_has_the_sum_of_their_ranks() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let weights = lora::formats::peft::load(folder("conv2d"), &CPU)?;
    let sum = lora::merge::add_weighted(&[(&weights, 0.5), (&weights, -2.)])?;
    lora::formats::peft::save(dir.path(), &sum)?;
    let saved = read_state_dict(dir.path().join("adapter_model.safetensors"), &CPU)?.tensors;
    assert_eq!(saved["base_model.model.layer.lora_A.weight"].dims(), [4, 4, 3, 3]);
    let base: StateDict =
        [("layer.weight".to_owned(), of("conv2d")?["base.layer.weight"].clone())].into();
    let w = &base["layer.weight"];
    let merged = |weights: &lora::LoraWeights| -> Result<Tensor> {
        Ok((&lora::merge::merge_into(&base, weights)?["layer.weight"] - w)?)
    };
    assert!(difference(&merged(&sum)?, &(merged(&weights)? * -1.5)?)? < 1e-9);
    Ok(())
}

#[test]
fn a_served_convolution_of_peft_s_records_no_graph() -> Result<()> {
    for case in ["conv2d", "conv2d_dora"] {
        let fixture = of(case)?;
        let base = fixture
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix("base.")?.to_owned(), t.clone())));
        let set = lora::Adapters::new();
        let base = VarBuilder::from_tensors(base.collect(), DType::F64, &CPU);
        let layer = layer(case, set.var_builder(base.clone()))?;
        set.add("a", &Adapter::load(folder(case), &CPU)?)?;
        let y =
            set.choice("a")?.run_local(|| -> Result<_> { Ok(layer.forward(&fixture["x"])?) })?;
        assert!(!y.track_op(), "{case}");
        let own = Adapter::load(folder(case), &CPU)?;
        let alone = self::layer(case, own.var_builder(base))?;
        own.eval()?;
        assert!(difference(&y, &alone.forward(&fixture["x"])?)? < 1e-9, "{case}");
    }
    Ok(())
}
