//! A model whose layers are checkpointed computes the same as one that keeps its activations.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use loralib::nn::{self as candle_nn, VarBuilder, VarMap};
use loralib::{Adapter, Bias, LoraConfig};
use std::collections::BTreeMap;
use std::sync::Arc;

const LAYERS: usize = 3;
const WIDTH: usize = 8;

/// Layers that add to their input what two linear layers compute from it.
struct Model {
    layers: Vec<Arc<(candle_nn::Linear, candle_nn::Linear)>>,
}

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        let layer = |i: usize| {
            let vb = vb.pp("layers").pp(i);
            let up = candle_nn::linear(WIDTH, 2 * WIDTH, vb.pp("up"))?;
            Ok(Arc::new((up, candle_nn::linear(2 * WIDTH, WIDTH, vb.pp("down"))?)))
        };
        Ok(Self { layers: (0..LAYERS).map(layer).collect::<Result<_>>()? })
    }

    fn forward(&self, x: &Tensor, adapter: Option<&Adapter>) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            let layer = layer.clone();
            let run =
                move |x: &Tensor| x + layer.1.forward(&candle_nn::ops::silu(&layer.0.forward(x)?)?);
            x = match adapter {
                Some(adapter) => adapter.checkpoint(&format!("layers.{i}"), &x, run)?,
                None => run(&x)?,
            };
        }
        Ok(x)
    }
}

fn adapted(cfg: LoraConfig, dtype: DType) -> loralib::Result<(Adapter, Model)> {
    let pretrained = VarMap::new();
    let base = || {
        let vb = VarBuilder::from_varmap(&pretrained, DType::F32, &Device::Cpu);
        loralib::seeded(vb, 1)
    };
    Model::new(base())?;
    let tensors = pretrained.data().lock().unwrap();
    let tensors = tensors.iter().map(|(n, v)| Ok((n.clone(), v.detach().to_dtype(dtype)?)));
    let base = VarBuilder::from_tensors(tensors.collect::<Result<_>>()?, dtype, &Device::Cpu);
    let adapter = Adapter::new(cfg).targets(["up", "down"]).trainable(Bias::All)?.seed(7);
    let model = Model::new(adapter.var_builder(base))?;
    for (name, var) in adapter.named_vars()? {
        if name.ends_with("lora_B") {
            let ramp = Tensor::arange(0f32, var.elem_count() as f32, &Device::Cpu)?;
            var.set(&(ramp * 0.01)?.sin()?.reshape(var.shape())?)?;
        }
    }
    Ok((adapter, model))
}

type Gradients = BTreeMap<String, Vec<f32>>;

/// The output, the gradient of the input if it has one, and those of all variables.
fn run(
    (adapter, model): &(Adapter, Model),
    x: &Tensor,
    checkpoint: bool,
) -> loralib::Result<(Vec<f32>, Gradients)> {
    adapter.set_dropout_position(0);
    let values = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let y = model.forward(x, checkpoint.then_some(adapter))?;
    let grads = y.to_dtype(DType::F32)?.sqr()?.sum_all()?.backward()?;
    let mut all = Gradients::new();
    for (name, var) in adapter.named_vars()? {
        all.insert(name, values(grads.get(&var).expect("a gradient"))?);
    }
    if x.is_variable() {
        all.insert("x".to_owned(), values(grads.get(x).expect("a gradient"))?);
    }
    Ok((values(&y)?, all))
}

#[test]
fn outputs_and_gradients_are_the_same_to_the_bit() -> loralib::Result<()> {
    let cfg = LoraConfig { r: 2, lora_alpha: 4., ..Default::default() };
    for dropout in [0., 0.3] {
        for dtype in [DType::F32, DType::BF16] {
            let model = adapted(LoraConfig { lora_dropout: dropout, ..cfg }, dtype)?;
            let x = Tensor::arange(0f32, 40., &Device::Cpu)?.sin()?.reshape((5, WIDTH))?;
            let x = Var::from_tensor(&x.to_dtype(dtype)?)?;
            for x in [x.as_tensor().clone(), x.detach()] {
                let kept = run(&model, &x, false)?;
                assert_eq!(run(&model, &x, true)?, kept, "{dropout} {dtype:?}");
                let drawn = if dropout > 0. { 2 * LAYERS as u64 } else { 0 };
                assert_eq!(model.0.dropout_position(), drawn);
            }
        }
    }
    Ok(())
}

#[test]
fn evaluation_records_no_graph() -> loralib::Result<()> {
    let cfg = LoraConfig { r: 2, ..Default::default() };
    let (adapter, model) = adapted(cfg, DType::F32)?;
    adapter.eval()?;
    let x = Tensor::ones((5, WIDTH), DType::F32, &Device::Cpu)?;
    let (kept, again) = (model.forward(&x, None)?, model.forward(&x, Some(&adapter))?);
    assert_eq!(kept.to_vec2::<f32>()?, again.to_vec2::<f32>()?);
    Ok(())
}

#[test]
fn dropout_without_a_seed_is_refused() -> loralib::Result<()> {
    let base = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let cfg = LoraConfig { r: 2, lora_dropout: 0.1, ..Default::default() };
    let adapter = Adapter::new(cfg).targets(["up", "down"]);
    let model = Model::new(adapter.var_builder(base))?;
    let x = Tensor::ones((5, WIDTH), DType::F32, &Device::Cpu)?;
    let error = model.forward(&x, Some(&adapter)).unwrap_err().to_string();
    assert!(error.contains("needs a seed"), "{error}");
    Ok(())
}

#[test]
fn seeded_dropout_is_the_same_in_every_run() -> loralib::Result<()> {
    let cfg = LoraConfig { r: 2, lora_dropout: 0.5, ..Default::default() };
    let x = Tensor::ones((5, WIDTH), DType::F32, &Device::Cpu)?;
    let outputs = || {
        let (_adapter, model) = adapted(cfg, DType::F32)?;
        let forward = || model.forward(&x, None)?.to_vec2::<f32>();
        loralib::Result::Ok([forward()?, forward()?])
    };
    let (one, other) = (outputs()?, outputs()?);
    assert_eq!(one, other);
    assert_ne!(one[0], one[1], "each forward has masks of its own");
    Ok(())
}
