//! The trained variables and their initial values.

use crate::common::{bits, rnd, CFG};
use crate::{adapter, base, fails, names, randomize, Model, CPU};
use candle_core::{DType, Result};
use candle_nn::{VarBuilder, VarMap};
use lora::Bias;
use loralib as lora;

#[test]
fn adapter_map_holds_the_trained_variables_only() -> Result<()> {
    let lora = ["q.lora_A", "q.lora_B"];
    let cases: [(lora::utils::Trainable, &[&str]); 4] = [
        (Bias::None.into(), &[]),
        (Bias::LoraOnly.into(), &["q.bias"]),
        (Bias::All.into(), &["classifier.bias", "k.bias", "q.bias"]),
        (Bias::None.and("classifier"), &["classifier.bias", "classifier.weight"]),
    ];
    for (trainable, others) in cases {
        let (_, vars) = adapter(trainable.clone())?;
        let mut expected: Vec<String> = lora.iter().chain(others).map(|s| s.to_string()).collect();
        expected.sort();
        assert_eq!(names(&vars), expected, "{trainable:?}");
        let saved = lora::lora_state_dict(&vars, trainable.clone())?;
        assert_eq!(saved.keys().cloned().collect::<Vec<_>>(), expected);
        let trained = lora::mark_only_lora_as_trainable(&vars, trainable.clone())?;
        for (var, (name, tensor)) in trained.iter().zip(&saved) {
            assert_eq!(bits(var)?, bits(tensor)?, "{name}");
        }
        // The same selection of one VarMap with all variables.
        let all = VarMap::new();
        Model::new(VarBuilder::from_varmap(&all, DType::F32, &CPU))?;
        let saved = lora::lora_state_dict(&all, trainable)?;
        assert_eq!(saved.keys().cloned().collect::<Vec<_>>(), expected);
    }
    Ok(())
}

#[test]
fn trained_biases_are_copies_of_the_base() -> Result<()> {
    let base = base(true)?;
    let adapter = VarMap::new();
    Model::new(lora::var_builder(base.clone(), &adapter, Bias::All))?;
    let own = base.get(4, "q.bias")?;
    let before = bits(&own)?;
    let var = adapter.data().lock().unwrap()["q.bias"].clone();
    assert_eq!(bits(&var)?, before);
    var.set(&(own.ones_like()? * 7.)?)?;
    assert_eq!(bits(&base.get(4, "q.bias")?)?, before);
    Ok(())
}

#[test]
fn wrapped_layers_train_the_selected_bias() -> Result<()> {
    for (trainable, trained) in [(Bias::None, false), (Bias::LoraOnly, true), (Bias::All, true)] {
        let adapter = VarMap::new();
        let vb = lora::var_builder(base(true)?, &adapter, trainable).pp("q");
        let layer = lora::Linear::new(candle_nn::linear(4, 4, vb.clone())?, CFG, vb)?;
        assert_eq!(names(&adapter).contains(&"q.bias".to_owned()), trained, "{trainable}");
        assert_eq!(layer.bias().unwrap().is_variable(), trained, "{trainable}");
    }
    Ok(())
}

#[test]
fn frozen_base_is_a_copy_of_its_var_map() -> Result<()> {
    let vars = VarMap::new();
    Model::new(VarBuilder::from_varmap(&vars, DType::F32, &CPU))?;
    let adapter = VarMap::new();
    let base = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let model = Model::new(lora::var_builder(base, &adapter, Bias::None))?;
    assert_eq!(names(&adapter), ["q.lora_A", "q.lora_B"]);
    let x = rnd(1, &[2, 4], DType::F32)?.to_device(&CPU)?;
    let before = bits(&model.forward(&x)?)?;
    randomize(&vars, 3)?;
    assert_eq!(bits(&model.forward(&x)?)?, before);
    Ok(())
}

#[test]
fn only_selected_modules_may_be_new() -> Result<()> {
    let vars = VarMap::new();
    let empty = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let error = Model::new(lora::var_builder(empty, &VarMap::new(), Bias::All)).err().unwrap();
    assert!(error.to_string().contains("\"q.weight\""), "{error}");
    assert!(names(&vars).is_empty(), "no variable is created in the base");
    let new = |trainable: lora::utils::Trainable| {
        Model::new(lora::var_builder(base(false)?, &VarMap::new(), trainable))
    };
    assert!(new(Bias::None.into()).is_err());
    assert!(new(Bias::None.and("classifier")).is_ok());
    Ok(())
}

#[test]
fn empty_selections_are_errors() -> Result<()> {
    let vars = VarMap::new();
    fails(lora::mark_only_lora_as_trainable(&vars, Bias::All), &["0 variables", "all"]);
    fails(lora::lora_state_dict(&vars, Bias::None), &["nothing"]);
    let (_, vars) = adapter(Bias::None)?;
    fails(lora::lora_state_dict(&vars, Bias::None.and("head")), &["\"head\""]);
    fails("some".parse::<Bias>(), &["\"some\"", "lora_only"]);
    assert_eq!("lora_only".parse::<Bias>()?, Bias::LoraOnly);
    Ok(())
}

#[test]
fn adapted_weights_cannot_be_selected() -> Result<()> {
    for trainable in [lora::utils::Trainable::all_parameters(), Bias::None.and("q")] {
        let (_, vars) = adapter(trainable.clone())?;
        let message = ["\"q.weight\"", "frozen"];
        fails(lora::mark_only_lora_as_trainable(&vars, trainable.clone()), &message);
        fails(lora::lora_state_dict(&vars, trainable), &message);
    }
    Ok(())
}
