//! The `Adapter`: targets, mode, files and merged bases, over a small model in candle's own style.

use crate::common::{bits, difference, randn};
use candle_core::{DType, Device, Module, Result, Tensor, D};
use loralib as lora;
use loralib::adapter::{AdapterConfig, Targets};
use loralib::layers::LayerKind;
use loralib::{nn as candle_nn, Adapter, Bias, LoraConfig, Mode};
use std::collections::HashMap;

use candle_nn::{
    embedding, linear, linear_no_bias, rms_norm, Embedding, Linear, RmsNorm, VarBuilder,
};

const CPU: Device = Device::Cpu;
pub const CFG: LoraConfig = LoraConfig { r: 2, lora_alpha: 3., ..LoraConfig::DEFAULT };

/// A model with a closure, a tuple and a weight that is read without a constructor.
pub struct Model {
    embed: Embedding,
    norm: RmsNorm,
    qkv: Linear,
    pair: (Linear, Linear),
    func: candle_nn::Func<'static>,
    head: Linear,
}

impl Model {
    pub fn new(vb: VarBuilder) -> Result<Self> {
        let layer = vb.pp("layers").pp(1);
        let down = linear(8, 8, layer.pp("down_proj"))?;
        // As candle-transformers' whisper does.
        let up = Linear::new(layer.pp("up_proj").get((8, 8), "weight")?, None);
        let gate = linear_no_bias(8, 8, vb.pp("layers").pp(2).pp("up_proj"))?;
        Ok(Self {
            embed: embedding(10, 8, vb.pp("embed"))?,
            norm: rms_norm(8, 1e-5, vb.pp("norm"))?,
            qkv: linear(8, 24, vb.pp("layers").pp(0).pp("qkv"))?,
            pair: (up, gate),
            func: candle_nn::func(move |x| down.forward(x)),
            head: linear(8, 3, vb.pp("head"))?,
        })
    }

    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let x = self.norm.forward(&self.embed.forward(ids)?)?;
        let qkv = self.qkv.forward(&x)?.chunk(3, D::Minus1)?;
        let p = candle_nn::ops::softmax_last_dim(&qkv[0].matmul(&qkv[1].t()?)?)?;
        let x = (x + p.matmul(&qkv[2])?)?;
        let x = candle_nn::ops::silu(&self.pair.0.forward(&x)?)? * self.pair.1.forward(&x)?;
        self.head.forward(&self.func.forward(&x?)?)
    }
}

pub fn base() -> HashMap<String, Tensor> {
    let shapes: [(&str, &[usize]); 9] = [
        ("embed.weight", &[10, 8]),
        ("norm.weight", &[8]),
        ("layers.0.qkv.weight", &[24, 8]),
        ("layers.0.qkv.bias", &[24]),
        ("layers.1.down_proj.weight", &[8, 8]),
        ("layers.1.down_proj.bias", &[8]),
        ("layers.1.up_proj.weight", &[8, 8]),
        ("layers.2.up_proj.weight", &[8, 8]),
        ("head.weight", &[3, 8]),
    ];
    let rand = |(name, dims): (&str, &[usize])| {
        (name.to_owned(), (randn(dims, DType::F32, &CPU).unwrap() * 0.4).unwrap())
    };
    let mut all: HashMap<_, _> = shapes.into_iter().map(rand).collect();
    all.insert("head.bias".to_owned(), Tensor::zeros(3, DType::F32, &CPU).unwrap());
    all
}

pub fn vb(base: &HashMap<String, Tensor>) -> VarBuilder<'static> {
    VarBuilder::from_tensors(base.clone(), DType::F32, &CPU)
}

pub fn ids() -> Tensor {
    Tensor::new(&[[1u32, 2, 3], [4, 5, 9]], &CPU).unwrap()
}

/// Random factors, so that the update is not zero.
pub fn randomize(adapter: &Adapter) -> lora::Result<()> {
    for var in adapter.vars()? {
        var.set(&(randn(var.shape(), var.dtype(), var.device())? * 0.5)?)?;
    }
    Ok(())
}

const ALL: [&str; 5] =
    ["embed", "layers.0.qkv", "layers.1.down_proj", "layers.1.up_proj", "layers.2.up_proj"];

fn adapted(adapter: Adapter) -> lora::Result<Vec<String>> {
    let _model = Model::new(adapter.var_builder(vb(&base())))?;
    adapter.check()?;
    assert_eq!(adapter.vars()?.len(), 2 * adapter.adapted().len());
    Ok(adapter.adapted())
}

#[test]
fn targets_follow_pefts_rules() -> lora::Result<()> {
    let new = || Adapter::new(CFG);
    assert_eq!(adapted(new().targets(["embed", "qkv", "down_proj", "up_proj"]))?, ALL);
    assert_eq!(adapted(new().targets(["up_proj"]))?, ALL[3..]);
    assert_eq!(adapted(new().targets(["layers.1.up_proj"]))?, ALL[3..4]);
    assert_eq!(adapted(new().targets(r"layers\.\d+\.(up|down)_proj"))?, ALL[2..]);
    assert_eq!(adapted(new().targets(r"layers\.\d+\.(?!up).*"))?, ALL[1..3]);
    let linear = ["head", ALL[1], ALL[2], ALL[3], ALL[4]];
    assert_eq!(adapted(new().targets("all-linear"))?, linear);
    assert_eq!(adapted(new().targets(Targets::all_linear()).exclude(["head"]))?, ALL[1..]);
    let second = || new().targets(["up_proj"]).layers([2]);
    assert_eq!(adapted(second().layers_pattern(["layers"]))?, ALL[4..]);
    assert_eq!(adapted(second().layers([]))?, ALL[3..]);
    let first = new().targets("all-linear").layers([0, 1]).layers_pattern(["layers"]);
    assert_eq!(adapted(first)?, ALL[1..4]);
    Ok(())
}

#[test]
fn the_mode_reaches_every_layer_and_eval_equals_train() -> lora::Result<()> {
    let base = base();
    let adapter = Adapter::new(CFG).targets(["embed", "qkv", "down_proj", "up_proj"]);
    let model = Model::new(adapter.var_builder(vb(&base)))?;
    adapter.check()?;
    let plain = Model::new(vb(&base))?;
    assert!(difference(&model.forward(&ids())?, &plain.forward(&ids())?)? < 1e-6);
    randomize(&adapter)?;
    let before = model.forward(&ids())?;
    assert!(difference(&before, &plain.forward(&ids())?)? > 1e-3);
    assert!(before.track_op());
    adapter.eval()?;
    let merged = model.forward(&ids())?;
    assert!(!merged.track_op(), "no graph in evaluation");
    assert!(model.pair.0.is_merged() && model.pair.1.mode() == Mode::Eval);
    assert!(difference(&merged, &before)? < 1e-5);
    adapter.train()?;
    assert_eq!(bits(&model.forward(&ids())?)?, bits(&before)?);
    // A model that is built in evaluation starts in it.
    adapter.eval()?;
    let other = Model::new(adapter.var_builder(vb(&base)))?;
    assert_eq!(bits(&other.forward(&ids())?)?, bits(&merged)?);
    Ok(())
}

#[test]
fn every_adapter_gets_its_gradient() -> lora::Result<()> {
    let adapter = Adapter::new(CFG).targets(["embed", "qkv", "down_proj", "up_proj"]);
    let model = Model::new(adapter.var_builder(vb(&base())))?;
    randomize(&adapter)?;
    let loss = || model.forward(&ids())?.sqr()?.mean_all();
    let grads = loss()?.backward()?;
    assert!(lora::missing_grads(adapter.var_map(), &grads).is_empty());
    assert_eq!(grads.get_ids().count(), 10, "frozen tensors have none");
    lora::utils::check_grads(adapter.var_map(), &grads, loss)?;
    Ok(())
}

#[test]
fn a_saved_adapter_loads_and_merges_into_an_unmodified_model() -> lora::Result<()> {
    let (base, dir) = (base(), tempfile::tempdir()?);
    let config = AdapterConfig::from(CFG)
        .with_layer("qkv", LayerKind::MergedLinear(vec![true, false, true]));
    let adapter = Adapter::new(config)
        .targets(["embed", "qkv", "down_proj", "up_proj"])
        .trainable(Bias::LoraOnly.and("head"))?;
    let model = Model::new(adapter.var_builder(vb(&base)))?;
    adapter.check()?;
    assert_eq!(adapter.vars()?.len(), 10 + 2 + 2, "factors, biases of adapted layers, the head");
    randomize(&adapter)?;
    adapter.eval()?;
    let expected = model.forward(&ids())?;
    let (file, folder) = (dir.path().join("a.safetensors"), dir.path().join("folder"));
    adapter.save(&file)?;
    adapter.save_pretrained(&folder)?;
    for path in [&file, &folder] {
        let loaded = Adapter::load(path, &CPU)?;
        // candle's own layers, unaware of the adapter.
        let served = Model::new(loaded.merged(vb(&base))?)?;
        assert!(difference(&served.forward(&ids())?, &expected)? < 1e-5, "{path:?}");
        let trained = Model::new(loaded.var_builder(vb(&base)))?;
        loaded.check()?;
        loaded.eval()?;
        assert!(difference(&trained.forward(&ids())?, &expected)? < 1e-5, "{path:?}");
    }
    // Into an adapter that is there already.
    let fresh = Adapter::new(adapter.config())
        .targets(["embed", "qkv", "down_proj", "up_proj"])
        .trainable(Bias::LoraOnly.and("head"))?;
    let model = Model::new(fresh.var_builder(vb(&base)))?;
    assert_eq!(fresh.restore(&file)?.loaded.len(), 14);
    fresh.eval()?;
    assert_eq!(bits(&model.forward(&ids())?)?, bits(&expected)?);
    Ok(())
}

#[test]
fn a_tied_head_has_no_adapter_of_its_own() -> lora::Result<()> {
    let adapter = Adapter::new(CFG).targets(["embed"]);
    let vb = adapter.var_builder(vb(&base()));
    let embed = embedding(10, 8, vb.pp("embed"))?;
    let head = Linear::new(embed.embeddings().clone(), None);
    adapter.check()?;
    assert!(embed.lora_a().is_some() && head.lora_a().is_none());
    Ok(())
}

#[test]
fn a_summary_has_the_share_of_the_parameters_that_the_model_read() -> lora::Result<()> {
    let base = base();
    let adapter = Adapter::new(CFG).targets(["qkv"]).trainable(Bias::None.and("head"))?;
    assert!(adapter.summary().is_err(), "nothing is built");
    let _model = Model::new(adapter.var_builder(vb(&base)))?;
    let (factors, head) = (2 * (8 + 24), 3 * 8 + 3);
    let summary = adapter.summary()?;
    let total = base.values().map(Tensor::elem_count).sum::<usize>() + factors;
    assert_eq!((summary.trainable(), summary.total), (factors + head, Some(total)));
    Ok(())
}

#[test]
fn a_seeded_adapter_is_the_same_in_each_run() -> lora::Result<()> {
    let new = |seed| -> lora::Result<_> {
        let adapter = Adapter::new(CFG).targets(["qkv"]).seed(seed);
        Model::new(adapter.var_builder(vb(&base())))?;
        bits(&adapter.vars()?[0]).map_err(Into::into)
    };
    assert_eq!(new(1)?, new(1)?);
    assert_ne!(new(1)?, new(2)?);
    Ok(())
}

#[test]
fn dropout_is_active_in_training_alone() -> lora::Result<()> {
    let cfg = LoraConfig { lora_dropout: 0.5, ..CFG };
    let adapter = Adapter::new(cfg).targets(["embed", "qkv"]);
    let model = Model::new(adapter.var_builder(vb(&base())))?;
    adapter.check()?;
    randomize(&adapter)?;
    let apart = || -> Result<f64> { difference(&model.forward(&ids())?, &model.forward(&ids())?) };
    assert!(apart()? > 0.);
    adapter.eval()?;
    assert_eq!(apart()?, 0.);
    Ok(())
}

#[test]
fn biases_are_selected_as_for_loralibs_layers() -> lora::Result<()> {
    for (bias, expected) in [(Bias::None, 0), (Bias::LoraOnly, 1), (Bias::All, 3)] {
        let adapter = Adapter::new(CFG).targets(["qkv"]).trainable(bias)?;
        let model = Model::new(adapter.var_builder(vb(&base())))?;
        adapter.check()?;
        assert_eq!(adapter.vars()?.len(), 2 + expected, "{bias}");
        randomize(&adapter)?;
        let grads = model.forward(&ids())?.sqr()?.sum_all()?.backward()?;
        assert!(lora::missing_grads(adapter.var_map(), &grads).is_empty(), "{bias}");
    }
    Ok(())
}

#[test]
fn a_bf16_base_has_f32_factors_and_trains() -> lora::Result<()> {
    let base = base();
    let adapter = Adapter::new(CFG).targets(["embed", "qkv", "down_proj", "up_proj"]);
    let half = VarBuilder::from_tensors(base.clone(), DType::BF16, &CPU);
    let model = Model::new(adapter.var_builder(half))?;
    adapter.check()?;
    assert!(adapter.vars()?.iter().all(|var| var.dtype() == DType::F32));
    randomize(&adapter)?;
    let y = model.forward(&ids())?;
    assert_eq!(y.dtype(), DType::BF16);
    let grads = y.to_dtype(DType::F32)?.sqr()?.mean_all()?.backward()?;
    assert!(lora::missing_grads(adapter.var_map(), &grads).is_empty());
    adapter.eval()?;
    assert!(difference(&model.forward(&ids())?, &y)? < 5e-2, "merged in BF16");
    let whole = Model::new(adapter.var_builder(vb(&base)))?;
    assert!(difference(&y, &whole.forward(&ids())?)? < 5e-2, "as in F32");
    Ok(())
}

#[test]
fn an_adapter_saved_in_bf16_loads_as_f32_variables() -> lora::Result<()> {
    let (base, dir) = (base(), tempfile::tempdir()?);
    let cfg = LoraConfig { lora_dtype: Some(DType::BF16), ..CFG };
    let adapter = Adapter::new(cfg).targets(["qkv", "embed"]);
    let _model = Model::new(adapter.var_builder(vb(&base)))?;
    adapter.check()?;
    randomize(&adapter)?;
    let saved = adapter.state_dict()?;
    assert!(saved.values().all(|tensor| tensor.dtype() == DType::BF16));
    let (file, folder) = (dir.path().join("a.safetensors"), dir.path().join("folder"));
    adapter.save(&file)?;
    adapter.save_pretrained(&folder)?;
    for path in [&file, &folder] {
        let loaded = Adapter::load(path, &CPU)?;
        assert!(loaded.vars()?.iter().all(|var| var.dtype() == DType::F32), "{path:?}");
        for (name, tensor) in loaded.state_dict()? {
            assert_eq!(bits(&tensor)?, bits(&saved[&name])?, "{name}");
        }
    }
    Ok(())
}

/// loralib's own way to save does not pass the selection on: the adapter has them nonetheless, and does not train them.
#[test]
fn biases_and_heads_of_a_state_dict_are_loaded() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    let ones = |dims: &[usize]| Tensor::ones(dims, DType::F32, &CPU);
    let state = lora::utils::StateDict::from([
        ("fc.lora_A".to_owned(), ones(&[2, 4])?),
        ("fc.lora_B".to_owned(), ones(&[3, 2])?),
        ("fc.bias".to_owned(), ones(&[3])?),
        ("head.weight".to_owned(), ones(&[2, 3])?),
    ]);
    lora::save_state_dict(&state, LoraConfig { r: 2, ..Default::default() }, &path)?;
    let adapter = Adapter::load(&path, &CPU)?;
    assert!(adapter.weights()?.state_dict().keys().eq(state.keys()));
    let base = HashMap::from([
        ("fc.weight".to_owned(), ones(&[3, 4])?),
        ("fc.bias".to_owned(), (ones(&[3])? * 5.)?),
    ]);
    let merged = adapter.merged(VarBuilder::from_tensors(base, DType::F32, &CPU))?;
    assert_eq!(merged.get(3, "fc.bias")?.to_vec1::<f32>()?, [1.; 3]);
    assert_eq!(merged.get((2, 3), "head.weight")?.to_vec2::<f32>()?, [[1.; 3]; 2]);
    Ok(())
}
