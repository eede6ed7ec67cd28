//! The variables that a load sets; an error sets none.

use crate::common::{bits, rnd, values, CFG};
use crate::{adapter, fails, names, randomize, snapshot, Model, CPU};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use lora::utils::{StateDict, Trainable};
use lora::{Bias, LoraConfig, LoraModule, Strict};
use loralib as lora;
use std::collections::HashMap;

#[test]
fn checkpoints_are_restored_bit_for_bit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    let x = rnd(1, &[2, 4], DType::F32)?.to_device(&CPU)?;
    let (mut model, vars) = adapter(Bias::LoraOnly)?;
    randomize(&vars, 5)?;
    model.eval()?;
    // Saved in evaluation, loaded in training: the saved factors are never merged.
    lora::save_state_dict(&lora::lora_state_dict(&vars, Bias::LoraOnly)?, CFG, &path)?;
    let (mut fresh, other) = adapter(Bias::LoraOnly)?;
    let report = lora::load_checkpoint(&path, &other, CFG, Strict::Yes)?;
    assert_eq!(report.loaded, ["q.bias", "q.lora_A", "q.lora_B"]);
    assert!(report.missing.is_empty() && report.unexpected.is_empty());
    fresh.eval()?;
    assert_eq!(bits(&fresh.forward(&x)?)?, bits(&model.forward(&x)?)?);
    assert_eq!(lora::read_state_dict(&path, &CPU)?.config, Some(CFG.into()));

    // Also into one VarMap with all variables.
    let all = VarMap::new();
    Model::new(VarBuilder::from_varmap(&all, DType::F32, &CPU))?;
    let report = lora::load_checkpoint(&path, &all, CFG, Strict::Yes)?;
    assert_eq!(report.loaded.len(), 3);

    // A state dict is a copy: it does not follow the variables.
    let saved = lora::lora_state_dict(&vars, Bias::None)?;
    let before = bits(&saved["q.lora_A"])?;
    randomize(&vars, 77)?;
    assert_eq!(bits(&saved["q.lora_A"])?, before);
    Ok(())
}

#[test]
fn failed_load_sets_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.safetensors");
    let (_, vars) = adapter(Bias::LoraOnly)?;
    randomize(&vars, 5)?;
    let good = lora::lora_state_dict(&vars, Bias::LoraOnly)?;
    lora::save_state_dict(&good, CFG, &path)?;
    randomize(&vars, 50)?;
    let before = snapshot(&vars);
    for (cfg, words) in [
        (LoraConfig { r: 3, ..CFG }, ["r = 2", "has 3"]),
        (LoraConfig { r: 0, ..CFG }, ["r = 2", "has 0"]),
        (LoraConfig { lora_alpha: 4., ..CFG }, ["lora_alpha = 3", "has 4"]),
        (LoraConfig { rslora: true, ..CFG }, ["rslora = false", "has true"]),
    ] {
        let result = lora::load_checkpoint(&path, &vars, cfg, Strict::No);
        fails(result, &[words[0], words[1], "a.safetensors"]);
    }
    let load = |change: &dyn Fn(&mut StateDict), strict| {
        let mut state = good.clone();
        change(&mut state);
        lora::load_state_dict(&vars, &state, strict)
    };
    let put = |name: &'static str, t: Tensor| {
        move |s: &mut StateDict| {
            s.insert(name.to_owned(), t.clone());
        }
    };
    for strict in [Strict::Yes, Strict::No] {
        let wrong = put("q.lora_B", Tensor::zeros((2, 4), DType::F32, &CPU)?);
        fails(load(&wrong, strict), &["q.lora_B", "[2, 4]", "[4, 2]"]);
        let ints = put("q.lora_B", Tensor::zeros((4, 2), DType::U32, &CPU)?);
        fails(load(&ints, strict), &["q.lora_B", "U32"]);
        let nan = put("q.lora_B", (Tensor::zeros((4, 2), DType::F32, &CPU)? / 0.)?);
        fails(load(&nan, strict), &["q.lora_B", "finite"]);
        let large = put("q.lora_B", (Tensor::ones((4, 2), DType::F64, &CPU)? * 1e300)?);
        fails(load(&large, strict), &["q.lora_B", "finite"]);
        fails(load(&|s| s.clear(), strict), &["missing", "q.lora_A"]);
    }
    fails(load(&|s| drop(s.remove("q.lora_A")), Strict::Yes), &["missing [\"q.lora_A\"]"]);
    let extra = put("q.lora_C", Tensor::zeros(1, DType::F32, &CPU)?);
    fails(load(&extra, Strict::Yes), &["unexpected [\"q.lora_C\"]"]);
    let twice = put("q.conv.bias", Tensor::zeros(4, DType::F32, &CPU)?);
    fails(load(&twice, Strict::Yes), &["q.bias", "two names"]);
    assert_eq!(snapshot(&vars), before, "an error sets nothing");

    let report = load(&extra, Strict::No)?;
    assert_eq!(report.unexpected, ["q.lora_C"]);
    let report = load(&|s| drop(s.remove("q.lora_A")), Strict::No)?;
    assert_eq!((report.missing.len(), report.loaded.len()), (1, 2));
    Ok(())
}

#[test]
fn one_var_map_loads_an_adapter_or_a_base() -> Result<()> {
    let all = VarMap::new();
    Model::new(VarBuilder::from_varmap(&all, DType::F32, &CPU))?;
    let whole = lora::lora_state_dict(&all, Trainable::all_parameters());
    fails(whole, &["q.weight", "has an adapter"]);
    let factors = lora::lora_state_dict(&all, Bias::None)?;
    let vars = all.data().lock().unwrap().clone();
    let base: StateDict = vars
        .iter()
        .filter(|(name, _)| !factors.contains_key(*name))
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    let load = |state: &StateDict, without: &str| {
        let mut state = state.clone();
        assert!(without.is_empty() || state.remove(without).is_some());
        lora::load_state_dict(&all, &state, Strict::Yes)
    };
    assert_eq!(load(&base, "")?.loaded.len(), 6);
    assert_eq!(load(&factors, "")?.loaded, ["q.lora_A", "q.lora_B"]);
    for name in base.keys() {
        fails(load(&base, name), &[&format!("missing [{name:?}]")]);
    }
    // A state dict with factors is an adapter, also with a head or with the whole base.
    let adapter = lora::lora_state_dict(&all, Bias::None.and("classifier"))?;
    assert_eq!(load(&adapter, "")?.loaded.len(), 4);
    fails(load(&adapter, "q.lora_B"), &["missing [\"q.lora_B\"]"]);
    let both: StateDict = base.into_iter().chain(factors.clone()).collect();
    assert_eq!(load(&both, "k.bias")?.loaded.len(), 7);
    fails(load(&both, "q.lora_A"), &["missing [\"q.lora_A\"]"]);
    // Also under wrong names.
    let renamed = factors.into_iter().map(|(name, t)| (format!("model.{name}"), t)).collect();
    fails(load(&renamed, ""), &["missing [\"q.lora_A\", \"q.lora_B\"]", "model.q.lora_A"]);
    // A factor without its layer's weight in the VarMap is expected too.
    let factor = Var::zeros((2, 4), DType::F32, &CPU)?;
    all.data().lock().unwrap().insert("elsewhere.lora_A".to_owned(), factor);
    fails(load(&adapter, ""), &["missing [\"elsewhere.lora_A\"]"]);
    Ok(())
}

#[test]
fn second_names_of_convolutions_load() -> Result<()> {
    let weight = rnd(1, &[4, 3, 3, 3], DType::F32)?.to_device(&CPU)?;
    let bias = rnd(2, &[4], DType::F32)?.to_device(&CPU)?;
    let base = HashMap::from([
        ("c.conv.weight".to_owned(), weight.clone()),
        ("c.conv.bias".to_owned(), bias.clone()),
    ]);
    let base = VarBuilder::from_tensors(base, DType::F32, &CPU);
    let vars = VarMap::new();
    let vb = lora::var_builder(base, &vars, Bias::LoraOnly);
    let layer = lora::conv2d(3, 4, 3, Default::default(), CFG, vb.pp("c"))?;
    assert_eq!(bits(layer.weight())?, bits(&weight)?);
    assert_eq!(names(&vars), ["c.conv.bias", "c.lora_A", "c.lora_B"]);

    let vars = VarMap::new();
    let own = HashMap::from([("c.weight".to_owned(), weight), ("c.bias".to_owned(), bias.clone())]);
    let vb = lora::var_builder(VarBuilder::from_tensors(own, DType::F32, &CPU), &vars, Bias::All);
    lora::conv2d(3, 4, 3, Default::default(), CFG, vb.pp("c"))?;
    let mut state = lora::lora_state_dict(&vars, Bias::All)?;
    state.remove("c.bias");
    state.insert("c.conv.bias".to_owned(), bias.ones_like()?);
    let report = lora::load_state_dict(&vars, &state, Strict::Yes)?;
    assert_eq!(report.loaded, ["c.bias", "c.lora_A", "c.lora_B"]);
    Ok(())
}

#[test]
fn loaded_adapter_takes_effect_at_eval() -> Result<()> {
    let x = rnd(1, &[2, 4], DType::F32)?.to_device(&CPU)?;
    let (mut model, vars) = adapter(Bias::None)?;
    randomize(&vars, 5)?;
    model.eval()?;
    let one = bits(&model.forward(&x)?)?;
    let saved = lora::lora_state_dict(&vars, Bias::None)?;
    randomize(&vars, 6)?;
    model.eval()?;
    assert_ne!(bits(&model.forward(&x)?)?, one);
    let report = lora::load_state_dict(&vars, &saved, Strict::Yes)?;
    assert_eq!(report.loaded.len(), 2);
    model.eval()?;
    assert_eq!(bits(&model.forward(&x)?)?, one);
    Ok(())
}

#[test]
fn loads_cast_to_the_variables_dtype() -> Result<()> {
    let vars = VarMap::new();
    let a = Var::from_tensor(&Tensor::zeros(2, DType::BF16, &CPU)?)?;
    vars.data().lock().unwrap().insert("x.lora_A".to_owned(), a.clone());
    let state = StateDict::from([("x.lora_A".to_owned(), Tensor::new(&[1f64, 2.], &CPU)?)]);
    let report = lora::load_state_dict(&vars, &state, Strict::Yes)?;
    assert_eq!(report.loaded, ["x.lora_A"]);
    assert_eq!(values(&a)?, [1., 2.]);
    Ok(())
}
