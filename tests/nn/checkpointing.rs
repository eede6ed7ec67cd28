//! A model whose layers are checkpointed computes the same as one that keeps its activations.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use loralib::layers::InitLoraWeights;
use loralib::nn::{self as candle_nn, VarBuilder, VarMap};
use loralib::{Adapter, Adapters, Bias, LoraConfig};
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

fn base(dtype: DType) -> Result<VarBuilder<'static>> {
    let pretrained = VarMap::new();
    let vb = VarBuilder::from_varmap(&pretrained, DType::F32, &Device::Cpu);
    Model::new(loralib::base::seeded(vb, 1))?;
    let tensors = pretrained.data().lock().unwrap();
    let tensors = tensors.iter().map(|(n, v)| Ok((n.clone(), v.detach().to_dtype(dtype)?)));
    Ok(VarBuilder::from_tensors(tensors.collect::<Result<_>>()?, dtype, &Device::Cpu))
}

fn adapted(cfg: LoraConfig, dtype: DType) -> loralib::Result<(Adapter, Model)> {
    over_base(Adapter::new(cfg).targets(["up", "down"]).trainable(Bias::All)?.seed(7), dtype)
}

/// With a B that is not zero.
fn over_base(adapter: Adapter, dtype: DType) -> loralib::Result<(Adapter, Model)> {
    let model = Model::new(adapter.var_builder(base(dtype)?))?;
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
    adapter.set_dropout_position(0)?;
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
    let (uniform, mut all) = (InitLoraWeights::Uniform, vec![]);
    for (lora_dropout, use_dora) in [(0., false), (0.3, false), (0., true), (0.3, true)] {
        all.push((lora_dropout, use_dora, uniform));
        #[cfg(feature = "faer")]
        all.push((lora_dropout, use_dora, InitLoraWeights::Olora));
    }
    for (lora_dropout, use_dora, init_lora_weights) in all {
        for dtype in [DType::F32, DType::BF16] {
            let cfg = LoraConfig { lora_dropout, use_dora, init_lora_weights, ..cfg };
            let model = adapted(cfg, dtype)?;
            let x = Tensor::arange(0f32, 40., &Device::Cpu)?.sin()?.reshape((5, WIDTH))?;
            let x = Var::from_tensor(&x.to_dtype(dtype)?)?;
            for x in [x.as_tensor().clone(), x.detach()] {
                let kept = run(&model, &x, false)?;
                assert_eq!(run(&model, &x, true)?, kept, "{cfg:?} {dtype:?}");
                let drawn = if lora_dropout > 0. { 2 * LAYERS as u64 } else { 0 };
                assert_eq!(model.0.dropout_position(), drawn);
            }
        }
    }
    Ok(())
}

#[test]
fn a_chosen_adapter_is_chosen_again_in_the_backward() -> loralib::Result<()> {
    let cfg = LoraConfig { r: 2, lora_alpha: 4., ..Default::default() };
    let adapter = Adapter::new(cfg).targets(["up", "down"]).seed(7);
    let (adapter, alone) = over_base(adapter, DType::F32)?;
    let adapters = Adapters::new();
    let model = Model::new(adapters.var_builder(base(DType::F32)?))?;
    adapters.add("policy", &adapter)?;
    let x = Tensor::arange(0f32, 40., &Device::Cpu)?.sin()?.reshape((5, WIDTH))?;
    let loss = adapters.with("policy", || -> loralib::Result<_> {
        let reference = adapters.with_none(|| model.forward(&x, None))?;
        Ok((model.forward(&x, Some(&adapter))? - reference)?.sqr()?.sum_all()?)
    })?;
    let grads = loss.backward()?;
    let reference = adapters.with_none(|| model.forward(&x, None))?;
    let expected = (alone.forward(&x, None)? - reference)?.sqr()?.sum_all()?.backward()?;
    for (name, var) in adapter.named_vars()? {
        let of = |grads: &GradStore| grads.get(&var).expect("a gradient").flatten_all()?.to_vec1();
        let (found, expected): (Vec<f32>, _) = (of(&grads)?, of(&expected)?);
        assert_eq!(found, expected, "{name}");
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
    assert!(!again.track_op());
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
    let error = adapter.set_dropout_position(3).unwrap_err().to_string();
    assert!(error.contains("position 3"), "{error}");
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

/// A segment on one linear layer of `layers.0`, and what its backward says.
fn error_of(
    module: &str,
    segment: impl Fn(&(Adapter, Model), &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> loralib::Result<String> {
    let cfg = LoraConfig { r: 2, ..Default::default() };
    let model = Arc::new(adapted(cfg, DType::F32)?);
    let x = Var::from_tensor(&Tensor::ones((5, WIDTH), DType::F32, &Device::Cpu)?)?;
    let inside = model.clone();
    // Not a leaf, as any input but the first.
    let y = model.0.checkpoint(module, &(x.as_tensor() * 2.)?, move |x| segment(&inside, x))?;
    Ok(y.sum_all()?.backward().unwrap_err().to_string())
}

#[test]
fn a_segment_that_loses_a_gradient_is_an_error() -> loralib::Result<()> {
    let whole = |(_, model): &(Adapter, Model), x: &Tensor| {
        let layer = &model.layers[0];
        layer.1.forward(&layer.0.forward(x)?)
    };
    let outside = error_of("model.layers.0", whole)?;
    assert!(
        outside.contains("\"layers.0.") && outside.contains("outside of its module"),
        "{outside}"
    );
    let unused = error_of("layers.0", |(_, model), x| {
        let layer = &model.layers[0];
        layer.1.forward(&layer.0.forward(x)?.detach())
    })?;
    assert!(unused.contains("cuts the graph"), "{unused}");
    let other = error_of("layers.0", move |model, x| {
        let y = whole(model, x)?;
        y + model.1.layers[1].1.forward(&model.1.layers[1].0.forward(x)?)?
    })?;
    assert!(other.contains("\"layers.1."), "{other}");
    Ok(())
}

#[test]
fn a_module_without_variables_is_an_error_if_the_segment_has_some() -> loralib::Result<()> {
    let (adapter, model) = adapted(LoraConfig { r: 2, ..Default::default() }, DType::F32)?;
    let x = Tensor::ones((5, WIDTH), DType::F32, &Device::Cpu)?;
    let run = |module: &str| {
        let layer = model.layers[0].clone();
        adapter.checkpoint(module, &x, move |x| layer.1.forward(&layer.0.forward(x)?))
    };
    for module in ["model.layers.0", "layers.0."] {
        let error = run(module).unwrap_err().to_string();
        let expected =
            format!("none in the module {module:?}: the first is \"layers.0.down.bias\"");
        assert!(error.contains(&expected), "{error}");
    }
    adapter.eval()?;
    run("model.layers.0")?;
    Ok(())
}

#[test]
fn an_empty_module_is_the_whole_model() -> loralib::Result<()> {
    let (adapter, model) = adapted(LoraConfig { r: 2, ..Default::default() }, DType::F32)?;
    let x = Tensor::ones((5, WIDTH), DType::F32, &Device::Cpu)?;
    let layers = model.layers.clone();
    let whole = move |x: &Tensor| {
        let mut layers = layers.iter();
        layers.try_fold(x.clone(), |x, layer| layer.1.forward(&layer.0.forward(&x)?))
    };
    let grads = adapter.checkpoint("", &x, whole)?.sum_all()?.backward()?;
    assert!(loralib::missing_grads(adapter.var_map(), &grads).is_empty());
    Ok(())
}

/// An adapter whose `checkpoint` is called where a sum of two is chosen that train, or the other one.
#[test]
fn a_segment_that_trains_another_adapter_is_an_error() -> loralib::Result<()> {
    let adapters = Adapters::new();
    let model = Model::new(adapters.var_builder(base(DType::F32)?))?;
    let new = |name: &str, targets: &[&str]| -> loralib::Result<Adapter> {
        let cfg = LoraConfig { r: 2, ..Default::default() };
        let adapter = Adapter::new(cfg).targets(targets).seed(7);
        adapters.add(name, &adapter)?;
        Ok(adapter)
    };
    let (first, second) = (new("first", &["up", "down"])?, new("second", &["layers.2.up"])?);
    let x = Tensor::ones((5, WIDTH), DType::F32, &Device::Cpu)?;
    let x = Var::from_tensor(&x)?;
    let error = |chosen: &[(&str, f64)], adapter: &Adapter| -> loralib::Result<String> {
        let y = adapters.with(chosen, || model.forward(&x, Some(adapter)))?;
        Ok(y.sum_all()?.backward().unwrap_err().to_string())
    };
    let sum = error(&[("first", 0.5), ("second", 0.5)], &first)?;
    assert!(sum.contains("another adapter in the layer \"layers.2.up\""), "{sum}");
    let other = error(&[("first", 1.)], &second)?;
    assert!(other.contains("another adapter in the layer \"layers.2."), "{other}");
    Ok(())
}

#[test]
fn a_segment_that_gives_another_output_is_an_error() -> loralib::Result<()> {
    let runs = std::sync::atomic::AtomicU32::new(0);
    let other = error_of("layers.0", move |(_, model), x| {
        let layer = &model.layers[0];
        let runs = runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        layer.1.forward(&layer.0.forward(x)?)? * f64::from(runs + 1)
    })?;
    assert!(other.contains("another output"), "{other}");
    Ok(())
}

/// A run with dropout, stopped after three steps, saved and resumed.
#[test]
fn a_run_with_dropout_is_resumed_to_the_bit() -> loralib::Result<()> {
    use candle_nn::{Optimizer, ParamsAdamW};
    let cfg = LoraConfig { r: 2, lora_alpha: 4., lora_dropout: 0.3, ..Default::default() };
    let x = Tensor::arange(0f32, 40., &Device::Cpu)?.sin()?.reshape((5, WIDTH))?;
    let new = || {
        let (adapter, model) = adapted(cfg, DType::F32)?;
        let params = ParamsAdamW { lr: 1e-2, ..Default::default() };
        let opt = loralib::train::AdamW::named(adapter.named_vars()?, params)?;
        loralib::Result::Ok((adapter, model, opt))
    };
    type Run = (Adapter, Model, loralib::train::AdamW);
    let steps = |(adapter, model, opt): &mut Run, steps: usize| -> loralib::Result<Vec<Vec<f32>>> {
        for _ in 0..steps {
            opt.backward_step(&model.forward(&x, Some(adapter))?.sqr()?.mean_all()?)?;
        }
        let values = |var: &Var| var.flatten_all()?.to_vec1::<f32>();
        Ok(adapter.vars()?.iter().map(values).collect::<Result<_>>()?)
    };
    let whole = steps(&mut new()?, 6)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("state.safetensors");
    let mut first = new()?;
    steps(&mut first, 3)?;
    first.2.save(&path, &first.0.dropout_position())?;
    for lost in [false, true] {
        let mut second = new()?;
        let position: u64 = second.2.load(&path)?;
        if !lost {
            second.0.set_dropout_position(position)?;
        }
        assert_eq!(steps(&mut second, 3)? == whole, !lost);
    }
    Ok(())
}

/// candle's sums of empty tensors have the graph of their first operand alone; products have a gradient of zeros.
#[test]
fn an_empty_batch_is_checkpointed() -> loralib::Result<()> {
    let (adapter, model) = adapted(LoraConfig { r: 2, ..Default::default() }, DType::F32)?;
    let mut x = Tensor::zeros((0, 3, WIDTH), DType::F32, &Device::Cpu)?;
    for (i, layer) in model.layers.iter().enumerate() {
        let layer = layer.clone();
        let run = move |x: &Tensor| layer.1.forward(&layer.0.forward(x)?);
        x = adapter.checkpoint(&format!("layers.{i}"), &x, run)?;
    }
    let grads = x.sum_all()?.backward()?;
    adapter.require_grads(&grads)?;
    for (name, var) in adapter.named_vars()? {
        let grad = grads.get(&var).unwrap().abs()?.sum_all()?.to_scalar::<f32>()?;
        assert_eq!(grad, 0., "{name}");
    }
    Ok(())
}
