//! `BatchNorm` in training: a frozen base keeps its statistics, a trained module saves them.

use crate::common::{bits, randn};
use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
use candle_nn::Optimizer;
use loralib::nn::{batch_norm, conv2d, BatchNorm, Conv2d, VarBuilder, VarMap};
use loralib::train::AdamW;
use loralib::{Adapter, Bias, LoraConfig};
use std::sync::Arc;

struct Model(Conv2d, BatchNorm);

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self(
            conv2d(2, 3, 1, Default::default(), vb.pp("conv"))?,
            batch_norm(3, 1e-5, vb.pp("bn"))?,
        ))
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.1.forward_t(&self.0.forward(x)?, train)
    }
}

fn base() -> Result<VarBuilder<'static>> {
    let (vars, device) = (VarMap::new(), &Device::Cpu);
    Model::new(VarBuilder::from_varmap(&vars, DType::F32, device))?;
    let tensors = vars.data().lock().unwrap();
    let tensors = tensors.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
    Ok(VarBuilder::from_tensors(tensors.collect(), DType::F32, device))
}

fn input() -> Result<Tensor> {
    (randn(&[4, 2, 3, 3], DType::F32, &Device::Cpu)? * 3.)? + 1.
}

#[test]
fn a_frozen_base_keeps_its_statistics_in_training() -> loralib::Result<()> {
    let (x, folder) = (input()?, tempfile::tempdir()?);
    let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["conv"]);
    let base = base()?;
    let model = Model::new(adapter.var_builder(base.clone()))?;
    let y = model.forward(&x, true)?;
    assert!(y.track_op());
    assert_eq!(bits(&model.1.forward_train(&model.0.forward(&x)?)?)?, bits(&y)?);
    assert_eq!(model.1.running_mean().to_vec1::<f32>()?, [0.; 3]);
    let path = folder.path().join("adapter.safetensors");
    adapter.save(&path)?;
    let again = Adapter::load(&path, &Device::Cpu)?;
    let served = Model::new(again.merged(base)?)?;
    let apart = (served.forward(&x, false)? - y)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(apart < 1e-5, "{apart}");
    Ok(())
}

#[test]
fn a_trained_module_moves_and_saves_its_statistics() -> loralib::Result<()> {
    let (x, folder) = (input()?, tempfile::tempdir()?);
    let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["conv"]);
    let adapter = adapter.trainable(Bias::None.and("bn"))?;
    let base = base()?;
    let model = Model::new(adapter.var_builder(base.clone()))?;
    let theirs = candle_nn::batch_norm(3, 1e-5, base.pp("bn"))?;
    let hidden = model.0.forward(&x)?;
    assert_eq!(bits(&model.1.forward_t(&hidden, true)?)?, bits(&theirs.forward_t(&hidden, true)?)?);
    assert_eq!(bits(model.1.running_var())?, bits(theirs.running_var())?);
    let y = model.forward(&x, false)?;
    let path = folder.path().join("adapter.safetensors");
    adapter.save(&path)?;
    let again = Adapter::load(&path, &Device::Cpu)?;
    let apart = (Model::new(again.merged(base)?)?.forward(&x, false)? - y)?.abs()?.max_all()?;
    assert!(apart.to_scalar::<f32>()? < 1e-5);
    Ok(())
}

#[test]
fn every_constructor_freezes_statistics_that_are_no_variables() -> Result<()> {
    let (x, dims) = (input()?, &[2usize][..]);
    let tensor = |offset: f64| randn(dims, DType::F32, &Device::Cpu)?.abs()? + offset;
    let (mean, var, gain, bias) = (tensor(0.)?, tensor(0.5)?, tensor(0.)?, tensor(0.)?);
    let candle =
        candle_nn::BatchNorm::new(2, mean.clone(), var.clone(), gain.clone(), bias.clone(), 1e-5)?;
    let affine = bits(&candle.forward_t(&x, false)?)?;
    let plain = candle_nn::BatchNorm::new_no_bias(2, mean.clone(), var.clone(), 1e-5)?;
    let plain = bits(&plain.forward_t(&x, false)?)?;
    let frozen = || (mean.clone(), var.clone());
    let ((m, v), (g, b)) = (frozen(), (gain.clone(), bias.clone()));
    assert_eq!(bits(&BatchNorm::new(2, m, v, g, b, 1e-5)?.forward_t(&x, true)?)?, affine);
    let (m, v) = frozen();
    assert_eq!(bits(&BatchNorm::new_no_bias(2, m, v, 1e-5)?.forward_t(&x, true)?)?, plain);
    // Variables move.
    let moving = candle_core::Var::from_tensor(&mean.copy()?)?;
    let own = candle_core::Var::from_tensor(&var.copy()?)?;
    let norm =
        BatchNorm::new_no_bias(2, moving.as_tensor().clone(), own.as_tensor().clone(), 1e-5)?;
    assert_ne!(bits(&norm.forward_train(&x)?)?, plain);
    assert_ne!(bits(moving.as_tensor())?, bits(&mean)?);
    Ok(())
}

/// Statistics are saved, and have no gradient.
#[test]
fn a_trained_module_takes_steps() -> loralib::Result<()> {
    let (x, folder) = (input()?, tempfile::tempdir()?);
    let base = base()?;
    let new = || -> loralib::Result<_> {
        let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["conv"]);
        let adapter = adapter.trainable(Bias::None.and("bn"))?;
        let model = Model::new(adapter.var_builder(base.clone()))?;
        let opt = AdamW::named(adapter.named_vars()?, Default::default())?;
        Ok((adapter.clone(), model, opt.with_frozen(adapter.frozen_vars())?))
    };
    let (adapter, model, mut opt) = new()?;
    assert!(!adapter.named_vars()?.contains_key("bn.running_mean"));
    let grads = model.forward(&x, true)?.sqr()?.mean_all()?.backward()?;
    adapter.require_grads(&grads)?;
    opt.step(&grads)?;
    let path = folder.path().join("state.safetensors");
    opt.save(&path, &0u32)?;
    assert!(adapter.state_dict()?.contains_key("bn.running_mean"));
    let (_resumed, other, mut opt) = new()?;
    opt.load::<u32>(&path)?;
    assert_eq!(bits(other.1.running_var())?, bits(model.1.running_var())?);
    assert_eq!(bits(&other.forward(&x, false)?)?, bits(&model.forward(&x, false)?)?);
    Ok(())
}

/// The backward runs a checkpointed segment again.
#[test]
fn a_checkpointed_module_moves_its_statistics_once() -> loralib::Result<()> {
    let (x, base) = (input()?, base()?);
    let step = |is_checkpointed: bool| -> loralib::Result<_> {
        let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["conv"]);
        let adapter = adapter.trainable(Bias::None.and("bn"))?.seed(1);
        let model = Arc::new(Model::new(adapter.var_builder(base.clone()))?);
        let segment = model.clone();
        let y = match is_checkpointed {
            true => adapter.checkpoint("", &x, move |x| segment.forward(x, true))?,
            false => model.forward(&x, true)?,
        };
        let moved = bits(model.1.running_var())?;
        adapter.require_grads(&y.sqr()?.mean_all()?.backward()?)?;
        assert_eq!(bits(model.1.running_var())?, moved);
        Ok((bits(model.1.running_mean())?, moved))
    };
    assert_ne!(step(true)?.0, bits(&Tensor::zeros(3, DType::F32, &Device::Cpu)?)?);
    assert_eq!(step(true)?, step(false)?);
    Ok(())
}

#[test]
fn a_state_without_statistics_names_the_way_to_have_them() -> loralib::Result<()> {
    let folder = tempfile::tempdir()?;
    let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["conv"]);
    let adapter = adapter.trainable(Bias::None.and("bn"))?;
    let _model = Model::new(adapter.var_builder(base()?))?;
    let new = || AdamW::named(adapter.named_vars()?, Default::default());
    let path = folder.path().join("state.safetensors");
    for (mut one, mut other) in [
        (new()?, new()?.with_frozen(adapter.frozen_vars())?),
        (new()?.with_frozen(adapter.frozen_vars())?, new()?),
    ] {
        one.save(&path, &0u32)?;
        assert_eq!(one.load::<u32>(&path)?, 0);
        let error = other.load::<u32>(&path).unwrap_err().to_string();
        for word in ["bn.running_", "with_frozen(adapter.frozen_vars())"] {
            assert!(error.contains(word), "{error}");
        }
    }
    Ok(())
}
