//! The table of `summary`, and the variables of `Trainable::all_parameters`.

use crate::common::{device, CFG};
use candle_core::{DType, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use lora::utils::Trainable;
use lora::Bias;
use loralib as lora;

#[test]
fn summary_has_a_row_per_layer_and_tensor() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device());
    let _qkv = lora::merged_linear(6, 12, &[true, false, true], CFG, vb.pp("attn.qkv"))?;
    let _conv = lora::conv2d(2, 4, 3, Default::default(), CFG, vb.pp("conv"))?;
    let _head = candle_nn::linear(6, 3, vb.pp("head"))?;
    let _frozen = candle_nn::linear(6, 3, vb.pp("frozen"))?;

    let summary = lora::utils::summary(&vars, Bias::LoraOnly.and("head"))?;
    let trained = lora::mark_only_lora_as_trainable(&vars, Bias::LoraOnly.and("head"))?;
    assert_eq!(summary.trainable(), trained.iter().map(|var| var.elem_count()).sum::<usize>());
    let expected = "\
layer           lora_A   lora_B  rank  parameters
attn.qkv        (4, 6)   (8, 2)     2          40
conv            (6, 6)  (12, 6)     6         108
also trained     shape           parameters";
    let expected = expected.split_whitespace().collect::<Vec<_>>();
    let printed = summary.to_string();
    let words: Vec<_> = printed.split_whitespace().collect();
    assert_eq!(words[..expected.len()], expected);
    for row in ["attn.qkv.bias", "conv.bias", "head.bias", "head.weight"] {
        assert!(printed.contains(&format!("\n{row} ")), "{row}\n{printed}");
    }
    assert!(printed.ends_with("\ntrained 185 parameters"), "{printed}");
    let share = summary.with_total(1850).to_string();
    assert!(share.ends_with("\ntrained 185 of 1,850 parameters (10.00 %)"), "{share}");
    Ok(())
}

#[test]
fn summary_has_a_column_of_magnitudes() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device());
    let dora = lora::LoraConfig { use_dora: true, ..CFG };
    let _q = lora::linear(6, 4, dora, vb.pp("q"))?;
    let _v = lora::linear(6, 4, CFG, vb.pp("v"))?;
    let printed = lora::utils::summary(&vars, Bias::None)?.to_string();
    let expected = "\
layer   lora_A  lora_B  magnitude  rank  parameters
q       (2, 6)  (4, 2)  (4)           2          24
v       (2, 6)  (4, 2)                2          20
trained 44 parameters";
    assert_eq!(printed, expected);
    Ok(())
}

#[test]
fn all_parameters_start_at_the_base() -> Result<()> {
    let weight = Tensor::ones((3, 6), DType::F32, &device())?;
    let base = || {
        let tensors = [("fc.weight".to_owned(), weight.clone())].into();
        VarBuilder::from_tensors(tensors, DType::F32, &device())
    };
    let vars = VarMap::new();
    let trainable = Trainable::all_parameters().and("head");
    let vb = lora::var_builder(base(), &vars, trainable.clone());
    let fc = lora::linear_no_bias(6, 3, Default::default(), vb.pp("fc"))?;
    assert!(fc.weight().is_variable());
    assert_eq!(fc.weight().to_vec2::<f32>()?, weight.to_vec2::<f32>()?);
    let error = lora::linear(6, 3, Default::default(), vb.pp("fc")).unwrap_err().to_string();
    assert!(error.contains("no tensor \"fc.bias\""), "{error}");
    let _head = lora::linear(3, 2, Default::default(), vb.pp("head"))?;

    let saved = lora::lora_state_dict(&vars, trainable)?;
    assert_eq!(saved.keys().collect::<Vec<_>>(), ["fc.weight", "head.bias", "head.weight"]);
    let error =
        lora::utils::summary(&VarMap::new(), Trainable::all_parameters()).unwrap_err().to_string();
    assert!(error.contains("none of 0 variables matches all parameters"), "{error}");
    Ok(())
}
