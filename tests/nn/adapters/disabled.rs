//! `Adapter::disabled`: the base of a model with one adapter.

use super::cfg;
use crate::adapter::{base, ids, randomize, vb, Model};
use crate::common::bits;
use loralib::{Adapter, Bias, LoraConfig, Result};

#[test]
fn the_base_computes_while_an_adapter_is_disabled() -> Result<()> {
    let base = base();
    let plain = bits(&Model::new(vb(&base))?.forward(&ids())?)?;
    let dropout = LoraConfig { lora_dropout: 0.5, ..cfg(2, 3.) };
    let adapter = Adapter::new(dropout).targets(["qkv", "up_proj"]).seed(1);
    let model = Model::new(adapter.var_builder(vb(&base)))?;
    randomize(&adapter)?;
    let disabled = || adapter.disabled(|| model.forward(&ids()));
    let y = disabled()?;
    assert_eq!(bits(&y)?, plain);
    assert!(!y.track_op());
    assert_eq!(adapter.dropout_position(), 0, "no mask is drawn");
    assert!(model.forward(&ids())?.track_op(), "it is enabled again");
    adapter.eval()?;
    let merged = bits(&model.forward(&ids())?)?;
    assert_ne!(merged, plain);
    assert_eq!(bits(&disabled()?)?, plain, "also of a merged model");
    assert_eq!(bits(&model.forward(&ids())?)?, merged, "which stays merged");
    let elsewhere = adapter.disabled(|| -> Result<_> {
        let other = std::thread::scope(|scope| scope.spawn(|| model.forward(&ids())).join());
        Ok(other.unwrap()?)
    })?;
    assert_eq!(bits(&elsewhere)?, merged, "other threads compute with the adapter");
    Ok(())
}

#[test]
fn an_adapter_that_replaces_biases_is_not_disabled() -> Result<()> {
    let adapter = Adapter::new(cfg(2, 3.)).targets(["down_proj"]).trainable(Bias::All)?;
    let model = Model::new(adapter.var_builder(vb(&base())))?;
    let error = adapter.disabled(|| model.forward(&ids())).unwrap_err().to_string();
    assert!(error.contains("\"head.bias\""), "{error}");
    assert!(error.contains("the base's own is not kept"), "{error}");
    Ok(())
}

#[test]
fn an_adapter_of_a_set_is_disabled_there() -> Result<()> {
    let served = super::Served::new()?;
    let (adapters, base) = (&served.adapters, served.forward()?);
    let sql = adapters.with("sql", || served.forward())?;
    let both = || adapters.with([("sql", 1.), ("chat", 1.)], || served.forward());
    let adapter = adapters.remove("sql")?;
    adapters.add("sql", &adapter)?;
    let equal = |x: &candle_core::Tensor, y| -> Result<bool> { Ok(bits(x)? == bits(y)?) };
    assert!(equal(&adapter.disabled(|| adapters.with("sql", || served.forward()))?, &base)?);
    assert!(equal(&adapters.with("sql", || adapter.disabled(|| served.forward()))?, &base)?);
    let chat = adapters.with("chat", || served.forward())?;
    assert!(equal(&adapter.disabled(both)?, &chat)?, "the others of a sum count");
    let rows = || adapters.with_rows(&[Some("sql"), None], || served.forward());
    assert!(!equal(&rows()?, &base)? && equal(&adapter.disabled(rows)?, &base)?);
    assert!(equal(&adapters.with("sql", || served.forward())?, &sql)?);
    Ok(())
}
