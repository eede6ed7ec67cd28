//! Training resumes from a saved adapter as if it had not been interrupted.
//!
//! SGD has no state, so that every bit must agree.

use crate::common::{rnd, CFG};
use crate::{base, names, snapshot, Model, CPU};
use candle_core::{DType, Result, Tensor};
use candle_nn::loss::mse;
use candle_nn::{Optimizer, VarMap, SGD};
use lora::adapter::AdapterConfig;
use lora::formats::peft;
use lora::utils::{load_weights, Trainable};
use lora::{LoraWeights, Strict};
use loralib as lora;

const STEPS: usize = 5;

fn trainable() -> Trainable {
    lora::Bias::LoraOnly.and("classifier")
}

/// A model on the pretrained base with a new adapter.
fn fresh() -> Result<(Model, VarMap)> {
    let adapter = VarMap::new();
    let model = Model::new(lora::var_builder(base(true)?, &adapter, trainable()))?;
    Ok((model, adapter))
}

/// The loss before each step of a new optimizer.
fn train(model: &Model, adapter: &VarMap) -> Result<Vec<f32>> {
    let mut sgd = SGD::new(lora::mark_only_lora_as_trainable(adapter, trainable())?, 0.1)?;
    let x = rnd(31, &[8, 4], DType::F32)?.to_device(&CPU)?;
    let y = rnd(32, &[8, 3], DType::F32)?.to_device(&CPU)?;
    let step = |_| {
        let loss: Tensor = mse(&model.forward(&x)?, &y)?;
        let grads = loss.backward()?;
        assert!(lora::missing_grads(adapter, &grads).is_empty());
        sgd.step(&grads)?;
        loss.to_scalar()
    };
    (0..STEPS).map(step).collect()
}

/// Trains, saves and continues; then continues in a new model from the saved adapter.
fn resumes(
    save: impl Fn(&VarMap) -> lora::Result<()>,
    load: impl Fn(&VarMap) -> lora::Result<()>,
) -> lora::Result<()> {
    let (model, adapter) = fresh()?;
    let before = train(&model, &adapter)?;
    save(&adapter)?;
    let saved = snapshot(&adapter);
    let unbroken = train(&model, &adapter)?;
    assert!(unbroken[STEPS - 1] < before[0], "{before:?} {unbroken:?}");

    let (resumed, loaded) = fresh()?;
    assert_ne!(snapshot(&loaded), saved);
    load(&loaded)?;
    assert_eq!(names(&loaded).len(), 5);
    assert_eq!(snapshot(&loaded), saved);
    assert_eq!(train(&resumed, &loaded)?, unbroken);
    assert_eq!(snapshot(&loaded), snapshot(&adapter));
    for (now, then) in snapshot(&loaded).iter().zip(&saved) {
        assert_ne!(now, then, "every variable is trained further");
    }
    Ok(())
}

#[test]
fn checkpoints_resume_bit_for_bit() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    resumes(
        |vars| lora::save_state_dict(&lora::lora_state_dict(vars, trainable())?, CFG, &path),
        |vars| lora::load_checkpoint(&path, vars, CFG, Strict::Yes).map(drop),
    )
}

#[test]
fn peft_adapters_resume_bit_for_bit() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let config = AdapterConfig::from(CFG).with_trainable(trainable())?;
    let save = |vars: &VarMap| {
        let tensors = lora::lora_state_dict(vars, trainable())?;
        peft::save(folder.path(), &LoraWeights::new(&config, tensors)?)
    };
    resumes(save, |vars| {
        let tensors = peft::load(folder.path(), &CPU)?.state_dict();
        lora::load_state_dict(vars, &tensors, Strict::Yes).map(drop)
    })?;
    resumes(save, |vars| {
        let weights = peft::load(folder.path(), &CPU)?;
        load_weights(&weights, vars, &config, Strict::Yes).map(drop)
    })
}
