//! Adapters that train among others.

use super::{cfg, Served};
use crate::adapter::{ids, randomize, vb, Model};
use crate::common::{bits, difference};
use candle_core::{DType, Device, Tensor};
use candle_nn::Optimizer;
use loralib::{missing_grads, Adapter, LoraConfig, Result};
use loralib::{nn as candle_nn, Adapters};

/// The preference loss of DPO on one pair: the policy over its reference.
fn dpo(policy: &Tensor, reference: &Tensor) -> candle_core::Result<Tensor> {
    let margin = (policy - reference.detach())?.narrow(2, 0, 1)?.sum_all()?;
    // -log σ(margin)
    (margin.neg()?.exp()? + 1.)?.log()
}

#[test]
fn a_step_of_dpo_changes_the_policy_alone() -> Result<()> {
    let served = Served::new()?;
    let policy = Adapter::new(cfg(2, 3.)).targets(["qkv", "up_proj"]).seed(1);
    served.adapters.add("policy", &policy)?;
    policy.check()?;
    randomize(&policy)?;
    let reference = || served.adapters.with("sql", || served.forward());
    let before = bits(&reference()?)?;
    let y = served.adapters.with("policy", || served.forward())?;
    let grads = dpo(&y, &reference()?)?.backward()?;
    assert!(missing_grads(policy.var_map(), &grads).is_empty());
    for (name, other, _) in &served.alone {
        let own = other.vars()?;
        assert!(own.iter().all(|var| grads.get(var).is_none()), "{name} has no gradient");
    }
    let mut opt = candle_nn::AdamW::new_lr(policy.vars()?, 1e-2)?;
    opt.step(&grads)?;
    assert_eq!(bits(&reference()?)?, before);
    assert!(difference(&served.adapters.with("policy", || served.forward())?, &y)? > 1e-4);
    Ok(())
}

#[test]
fn the_base_is_frozen_also_if_it_is_of_variables() -> Result<()> {
    let pretrained = candle_nn::VarMap::new();
    let base = || candle_nn::VarBuilder::from_varmap(&pretrained, DType::F32, &Device::Cpu);
    Model::new(base())?;
    let (adapters, adapter) = (Adapters::new(), Adapter::new(cfg(2, 3.)).targets(["qkv"]));
    let model = Model::new(adapters.var_builder(base()))?;
    adapters.add("new", &adapter)?;
    let grads = adapters.with("new", || model.forward(&ids()))?.sqr()?.sum_all()?.backward()?;
    assert!(adapter.vars()?.iter().all(|var| grads.get(var).is_some()));
    assert!(pretrained.all_vars().iter().all(|var| grads.get(var).is_none()));
    assert!(!model.forward(&ids())?.track_op());
    Ok(())
}

#[test]
fn a_new_adapter_is_created_as_by_its_own_var_builder() -> Result<()> {
    let base = crate::adapter::base();
    let new = || Adapter::new(cfg(2, 3.)).targets(["embed", "qkv", "up_proj"]).seed(3);
    let (alone, added, adapters) = (new(), new(), Adapters::new());
    let own = Model::new(alone.var_builder(vb(&base)))?;
    let model = Model::new(adapters.var_builder(vb(&base)))?;
    adapters.add("new", &added)?;
    added.check()?;
    assert_eq!(added.adapted(), alone.adapted());
    assert_eq!(added.config(), alone.config());
    let (a, b) = (alone.state_dict()?, added.state_dict()?);
    assert!(a.keys().eq(b.keys()));
    for (name, tensor) in &a {
        assert_eq!(bits(tensor)?, bits(&b[name])?, "{name}");
    }
    // So do its gradients.
    let (x, y) = (own.forward(&ids())?, adapters.with("new", || model.forward(&ids()))?);
    assert_eq!(bits(&x)?, bits(&y)?);
    let (x, y) = (x.sqr()?.sum_all()?.backward()?, y.sqr()?.sum_all()?.backward()?);
    for (own, var) in alone.vars()?.iter().zip(added.vars()?) {
        let (own, grad) = (x.get(own).expect("a gradient"), y.get(&var).expect("a gradient"));
        assert_eq!(bits(own)?, bits(grad)?);
    }
    Ok(())
}

#[test]
fn in_a_sum_the_gradients_are_those_of_the_strengths() -> Result<()> {
    let served = Served::new()?;
    let [policy, other] = [2, 3].map(|r| Adapter::new(cfg(r, 3.)).targets(["qkv", "head"]));
    for (name, adapter) in [("policy", &policy), ("other", &other)] {
        served.adapters.add(name, adapter)?;
        randomize(adapter)?;
    }
    let loss = || {
        let strengths = [("policy", 0.5), ("other", -2.), ("sql", 1.)];
        served.adapters.with(strengths, || served.forward())?.sqr()?.sum_all()
    };
    let grads = loss()?.backward()?;
    // A central difference along the gradient of each adapter.
    for adapter in [&policy, &other] {
        let vars = adapter.named_vars()?;
        let along = |step: f64| -> Result<f64> {
            let before: Vec<_> =
                vars.values().map(|v| v.copy()).collect::<candle_core::Result<_>>()?;
            for var in vars.values() {
                let grad = grads.get(var).expect("a gradient");
                var.set(&(var.as_tensor() + (grad * step)?)?)?;
            }
            let loss = f64::from(loss()?.to_scalar::<f32>()?);
            for (var, value) in vars.values().zip(&before) {
                var.set(value)?;
            }
            Ok(loss)
        };
        let norm: f64 = vars
            .values()
            .map(|v| Ok(f64::from(grads.get(v).unwrap().sqr()?.sum_all()?.to_scalar::<f32>()?)))
            .sum::<Result<f64>>()?;
        let step = 1e-2 / norm.sqrt();
        let slope = (along(step)? - along(-step)?) / (2. * step);
        assert!((slope / norm - 1.).abs() < 2e-2, "{slope} and {norm}");
    }
    Ok(())
}

#[test]
fn dropout_is_of_the_adapter_that_trains_alone() -> Result<()> {
    let served = Served::new()?;
    let dropout = LoraConfig { lora_dropout: 0.5, ..cfg(2, 3.) };
    let policy = Adapter::new(dropout).targets(["qkv"]);
    served.adapters.add("policy", &policy)?;
    randomize(&policy)?;
    let forward = || served.adapters.with("policy", || served.forward());
    assert_ne!(bits(&forward()?)?, bits(&forward()?)?);
    let error = served.adapters.with([("policy", 0.5)], || served.forward()).unwrap_err();
    assert!(error.to_string().contains("\"policy\" trains with dropout"), "{error}");
    policy.eval()?;
    assert_eq!(bits(&forward()?)?, bits(&forward()?)?);
    served.adapters.with([("policy", 0.5)], || served.forward())?;
    Ok(())
}
