//! What is refused, with names and values, and changes nothing.

use super::{cfg, Served};
use crate::adapter::{base, ids, vb, Model};
use crate::common::bits;
use crate::common::says;
use candle_core::{DType, Device, Tensor};
use loralib::adapter::AdapterConfig;
use loralib::layers::LayerKind;
use loralib::utils::StateDict;
use loralib::{save_state_dict, Adapter, Adapters, Bias, Result};

#[test]
fn a_choice_that_cannot_be_made_is_an_error() -> Result<()> {
    let served = Served::new()?;
    let with = |strengths: &[(&str, f64)]| served.adapters.with(strengths, || served.forward());
    says(with(&[]), &["no adapter is chosen", "with_none"]);
    says(with(&[("sqk", 1.)]), &["no adapter \"sqk\"", "\"sql\""]);
    says(with(&[("sql", f64::NAN)]), &["weight", "\"sql\"", "NaN"]);
    says(with(&[("sql", 0.5), ("sql", 0.5)]), &["\"sql\"", "twice"]);
    says(served.adapters.sum([("sql", f64::INFINITY)]), &["\"sql\"", "inf"]);
    let rows = |rows: &[Option<&str>]| served.adapters.with_rows(rows, || served.forward());
    says(rows(&[]), &["no rows"]);
    says(rows(&[Some("sql"), Some("sqk")]), &["no adapter \"sqk\""]);
    says(rows(&[Some("sql"), None, None]), &["[2, 3, 8]", "(3, ..)"]);
    says(rows(&[Some("chat"), None, None]), &["[2, 3]", "(3, ..)"]);
    let positions = Tensor::new(&[0u32, 1], &Device::Cpu)?;
    let rows_of = |ids: Tensor| {
        served.adapters.with_rows(&[Some("chat"), None], || served.model.forward(&ids))
    };
    says(rows_of(positions), &["ids are [2]", "unsqueeze"]);
    served.alone[0].1.train()?;
    says(rows(&[Some("sql"), None]), &["\"sql\" trains", "eval()"]);
    says(served.adapters.remove("sqk"), &["no adapter \"sqk\""]);
    Ok(())
}

/// A loaded adapter with these tensors besides factors that fit `up_proj`.
fn loaded(config: AdapterConfig, others: &[(&str, &[usize])]) -> Result<Adapter> {
    let mut tensors = StateDict::new();
    let factors = [("layers.1.up_proj.lora_A", &[2, 8][..]), ("layers.1.up_proj.lora_B", &[8, 2])];
    for (name, shape) in factors.iter().chain(others) {
        tensors.insert((*name).to_owned(), Tensor::ones(*shape, DType::F32, &Device::Cpu)?);
    }
    tensors.retain(|_, tensor| tensor.elem_count() > 0);
    let dir = tempfile::tempdir()?;
    save_state_dict(&tensors, config, dir.path().join("a"))?;
    Adapter::load(dir.path().join("a"), &Device::Cpu)
}

#[test]
fn an_adapter_that_does_not_fit_is_not_added() -> Result<()> {
    let served = Served::new()?;
    let plain = || AdapterConfig::from(cfg(2, 3.));
    let names = served.adapters.names();
    let add = |adapter: &Adapter| served.adapters.add("new", adapter);
    let alien = [("layers.9.up_proj.lora_A", &[2, 8][..]), ("layers.9.up_proj.lora_B", &[8, 2])];
    says(add(&loaded(plain(), &alien)?), &["\"new\"", "layers.9.up_proj.lora_A", "no such layer"]);
    let shape =
        [("layers.1.down_proj.lora_A", &[2, 9][..]), ("layers.1.down_proj.lora_B", &[8, 2])];
    says(add(&loaded(plain(), &shape)?), &["\"new\"", "down_proj.lora_A", "[2, 9]", "[2, 8]"]);
    let half = [("layers.1.down_proj.lora_A", &[2, 8][..])];
    says(loaded(plain(), &half).map(drop), &["down_proj.lora_B", "it is missing"]);
    let bias = plain().with_trainable(Bias::All)?;
    says(add(&loaded(bias, &[("head.bias", &[3])])?), &["\"head.bias\"", "base's own", "merged"]);
    let bias_of_b = loaded(plain(), &[("layers.1.up_proj.lora_bias", &[8])])?;
    says(add(&bias_of_b), &["up_proj.lora_bias", "factors alone", "`Adapter::merged`"]);
    let parameter = plain().with_layer("layers.1.up_proj", LayerKind::Parameter { index: 0 });
    says(add(&loaded(parameter, &[])?), &["layers.1.up_proj", "merged alone"]);
    let module = Adapter::new(cfg(2, 3.)).targets(["up_proj"]).trainable(Bias::None.and("head"))?;
    says(add(&module), &["\"head\"", "base's own"]);
    let targets = Adapter::new(cfg(2, 3.)).targets(["up_proj", "q_proj"]);
    says(add(&targets), &["\"q_proj\"", "no layer"]);
    assert!(targets.vars().is_err(), "and it gets no variables");
    says(add(&Adapter::new(cfg(2, 3.))), &["adapts no layer"]);
    says(add(&Adapter::new(cfg(0, 3.)).targets(["up_proj"])), &["adapts no layer"]);
    let ambiguous = AdapterConfig::from(cfg(2, 3.)).with_layer("up_proj", LayerKind::Embedding);
    says(add(&Adapter::new(ambiguous).targets(["up_proj"])), &["declared as a Embedding"]);
    assert_eq!(served.adapters.names(), names);
    let sql = bits(&served.adapters.with("sql", || served.forward())?)?;
    let taken = Adapter::new(cfg(2, 3.)).targets(["up_proj"]);
    says(served.adapters.add("sql", &taken), &["\"sql\" already", "remove it"]);
    assert!(taken.vars().is_err());
    assert_eq!(bits(&served.adapters.with("sql", || served.forward())?)?, sql);
    Ok(())
}

#[test]
fn adapters_need_a_model() -> Result<()> {
    let (adapters, adapter) = (Adapters::new(), Adapter::new(cfg(2, 3.)).targets("all-linear"));
    says(adapters.add("early", &adapter), &["\"early\"", "`Adapters::var_builder`"]);
    let model = Model::new(adapters.var_builder(vb(&base())))?;
    adapters.add("in time", &adapter)?;
    adapters.with("in time", || model.forward(&ids()))?;
    drop(model);
    says(adapters.add("late", &Adapter::new(cfg(2, 3.)).targets(["up_proj"])), &["dropped"]);
    Ok(())
}

/// A table that an adapter's file repeats is the base's own, or an error.
#[test]
fn an_adapter_does_not_replace_a_table() -> Result<()> {
    let base = base();
    let adapters = Adapters::new();
    let _model = Model::new(adapters.var_builder(vb(&base)))?;
    let dir = tempfile::tempdir()?;
    let with_table = |table: Tensor| -> Result<Adapter> {
        let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
        let tensors = StateDict::from([
            ("embed.lora_A".to_owned(), ones((2, 10))?),
            ("embed.lora_B".to_owned(), ones((8, 2))?),
            ("embed.weight".to_owned(), table),
        ]);
        save_state_dict(&tensors, cfg(2, 3.), dir.path().join("a"))?;
        Adapter::load(dir.path().join("a"), &Device::Cpu)
    };
    adapters.add("same", &with_table(base["embed.weight"].clone())?)?;
    let other = with_table((&base["embed.weight"] * 2.)?)?;
    says(adapters.add("other", &other), &["embed.weight", "one base"]);
    Ok(())
}
