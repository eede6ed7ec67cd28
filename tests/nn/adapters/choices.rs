//! One adapter, a weighted sum, or none.

use super::{cfg, Served};
use crate::adapter::{ids, vb, Model};
use crate::common::{bits, difference};
use candle_core::{Device, Tensor};
use loralib::adapters::WeightedAdapters;
use loralib::{Adapter, Adapters, LoraConfig, Result};
use std::collections::HashMap;

#[test]
fn a_chosen_adapter_computes_as_a_model_of_its_own() -> Result<()> {
    let served = Served::new()?;
    let plain = Model::new(vb(&served.base))?.forward(&ids())?;
    for (name, adapter, own) in &served.alone {
        let y = served.adapters.with(*name, || served.forward())?;
        assert!(!y.track_op(), "{name} serves without a graph");
        assert!(difference(&y, &own.forward(&ids())?)? < 1e-5, "{name}, merged");
        adapter.train()?;
        assert!(difference(&y, &own.forward(&ids())?)? < 1e-6, "{name}");
        assert!(difference(&y, &plain)? > 1e-3, "{name} has an effect");
    }
    Ok(())
}

#[test]
fn none_and_no_choice_equal_the_base_to_the_bit() -> Result<()> {
    let served = Served::new()?;
    let plain = bits(&Model::new(vb(&served.base))?.forward(&ids())?)?;
    assert_eq!(bits(&served.forward()?)?, plain);
    assert_eq!(bits(&served.adapters.with_none(|| served.forward())?)?, plain);
    let inside = || served.adapters.with_none(|| served.forward());
    assert_eq!(bits(&served.adapters.with("sql", inside)?)?, plain, "the inner choice counts");
    let failed = || -> Result<()> { Err(candle_core::Error::Msg("stop".into()).into()) };
    assert!(served.adapters.with("sql", failed).is_err());
    assert_eq!(bits(&served.forward()?)?, plain, "a choice ends with an error too");
    let panics = || served.adapters.with("sql", || -> Result<()> { panic!("stop") });
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
    assert_eq!(bits(&served.forward()?)?, plain, "and with a panic");
    Ok(())
}

/// The base's weights plus each adapter's update times its strength.
fn summed(served: &Served, strengths: &[(&str, f64)]) -> Result<HashMap<String, Tensor>> {
    let mut sum = served.base.clone();
    for (name, strength) in strengths {
        let adapter = &served.alone.iter().find(|(own, ..)| own == name).unwrap().1;
        let merged = adapter.merged(vb(&served.base))?;
        for (path, w) in &served.base {
            let delta = (merged.get(w.shape(), path)? - w)?;
            let so_far = sum[path].clone();
            sum.insert(path.clone(), (so_far + (delta * *strength)?)?);
        }
    }
    Ok(sum)
}

#[test]
fn a_weighted_sum_adds_the_updates() -> Result<()> {
    let served = Served::new()?;
    let cases: [&[(&str, f64)]; 4] = [
        &[("sql", 0.7), ("chat", 0.3)],
        &[("fused", -0.5), ("rslora", 0.25), ("sql", 1.)],
        &[("fused", 2.)],
        &[("chat", 0.)],
    ];
    for strengths in cases {
        let y = served.adapters.with(strengths, || served.forward())?;
        let expected = Model::new(vb(&summed(&served, strengths)?))?.forward(&ids())?;
        assert!(difference(&y, &expected)? < 1e-5, "{strengths:?}");
        let names: Vec<_> = strengths.iter().map(|(name, by)| (name.to_string(), *by)).collect();
        for owned in [WeightedAdapters::from(&names), WeightedAdapters::from(names)] {
            let again = served.adapters.with(owned, || served.forward())?;
            assert_eq!(bits(&again)?, bits(&y)?);
        }
    }
    Ok(())
}

#[test]
fn a_sum_is_an_adapter_to_merge_to_save_and_to_add() -> Result<()> {
    let served = Served::new()?;
    let dir = tempfile::tempdir()?;
    let strengths = [("fused", -0.5), ("rslora", 0.25), ("chat", 2.)];
    let y = served.adapters.with(strengths, || served.forward())?;
    let sum = served.adapters.sum(strengths)?;
    let merged = Model::new(sum.merged(vb(&served.base))?)?.forward(&ids())?;
    assert!(difference(&merged, &y)? < 1e-5);
    sum.save_pretrained(dir.path())?;
    for (name, adapter) in [("sum", sum), ("saved", Adapter::load(dir.path(), &Device::Cpu)?)] {
        served.adapters.add(name, &adapter)?;
        let sum = served.adapters.with(name, || served.forward())?;
        assert!(difference(&sum, &y)? < 1e-6, "{name}");
    }
    Ok(())
}

#[test]
fn a_choice_is_for_the_layers_of_its_own_set() -> Result<()> {
    let (one, other) = (Served::new()?, Served::new()?);
    let alone = bits(&one.adapters.with("sql", || one.forward())?)?;
    let both = one.adapters.with("sql", || other.adapters.with("chat", || one.forward()))?;
    assert_eq!(bits(&both)?, alone);
    Ok(())
}

#[test]
fn a_loaded_adapter_serves_without_dropout_until_it_trains() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dropout = LoraConfig { lora_dropout: 0.5, ..cfg(2, 3.) };
    let trained = Adapter::new(dropout).targets(["up_proj"]);
    let base = crate::adapter::base();
    Model::new(trained.var_builder(vb(&base)))?;
    crate::adapter::randomize(&trained)?;
    trained.save(dir.path().join("a"))?;
    let adapters = Adapters::new();
    let model = Model::new(adapters.var_builder(vb(&base)))?;
    let loaded = Adapter::load(dir.path().join("a"), &Device::Cpu)?;
    adapters.add("loaded", &loaded)?;
    let forward = || adapters.with("loaded", || model.forward(&ids()));
    let y = forward()?;
    assert!(!y.track_op());
    assert_eq!(bits(&forward()?)?, bits(&y)?, "no dropout");
    let merged = Model::new(loaded.merged(vb(&base))?)?.forward(&ids())?;
    assert!(difference(&y, &merged)? < 1e-5);
    loaded.train()?;
    assert!(forward()?.track_op());
    assert_ne!(bits(&forward()?)?, bits(&y)?, "dropout");
    Ok(())
}
