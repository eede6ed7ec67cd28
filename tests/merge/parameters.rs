//! Parameters without a layer: matrices and fused experts, and changes of biases and rows.

use crate::common::{bits, difference};
use crate::{cfg, tensor};
use candle_core::{DType, Tensor};
use lora::adapter::AdapterConfig;
use lora::layers::LayerKind;
use lora::merge::{add_weighted, merge_into};
use lora::utils::StateDict;
use lora::LoraWeights;
use loralib as lora;

fn factors(experts: usize, inputs: usize, outs: usize) -> StateDict {
    StateDict::from([
        ("m.w.lora_A".into(), tensor(1, &[experts, 2, inputs], DType::F32)),
        ("m.w.lora_B".into(), tensor(2, &[experts, outs, 2], DType::F32)),
    ])
}

fn config(transposed: Option<bool>) -> AdapterConfig {
    let mut config =
        AdapterConfig::from(cfg()).with_layer("m.w", LayerKind::Parameter { index: 0 });
    config.layers.get_mut("m.w").unwrap().fan_in_fan_out = transposed;
    config
}

fn merge(w: &Tensor, adapter: &StateDict, config: AdapterConfig) -> lora::Result<Tensor> {
    let base = StateDict::from([("m.w".to_owned(), w.clone())]);
    Ok(merge_into(&base, &LoraWeights::new(config, adapter.clone())?)?["m.w"].clone())
}

#[test]
fn each_expert_gets_its_update() -> lora::Result<()> {
    let delta = |adapter: &StateDict| {
        adapter["m.w.lora_B"].matmul(&adapter["m.w.lora_A"])? * cfg().scaling()
    };
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let limit = if dtype == DType::BF16 { 1e-1 } else { 1e-6 };
        let check = |dims: &[usize], adapter: &StateDict, transposed, declared| {
            let w = tensor(3, dims, dtype);
            let delta = delta(adapter)?;
            let delta = if transposed { delta.t()? } else { delta };
            let expected = (w.to_dtype(DType::F32)? + delta.reshape(dims)?)?;
            let merged = merge(&w, adapter, config(declared))?;
            assert_eq!(merged.dtype(), dtype);
            let apart = difference(&merged.to_dtype(DType::F32)?, &expected)?;
            assert!(apart < limit, "{dims:?} {apart}");
            lora::Result::Ok(())
        };
        check(&[3, 5, 4], &factors(3, 4, 5), false, None)?;
        check(&[3, 4, 5], &factors(3, 4, 5), true, None)?;
        check(&[1, 4, 5], &factors(1, 4, 5), true, None)?;
        check(&[5, 4], &factors(1, 4, 5), false, None)?;
        check(&[4, 4], &factors(1, 4, 4), false, None)?;
        check(&[3, 4, 4], &factors(3, 4, 4), false, Some(false))?;
        check(&[3, 4, 4], &factors(3, 4, 4), true, Some(true))?;
    }
    Ok(())
}

#[test]
fn parameters_that_do_not_fit_are_errors() {
    let refused = |dims: &[usize], adapter: &StateDict, words: &[&str]| {
        let error = merge(&tensor(3, dims, DType::F32), adapter, config(None)).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("m.w") && words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(&[3, 4, 4], &factors(3, 4, 4), &["square", "fan_in_fan_out"]);
    // The factors of another parameter of the module.
    refused(&[3, 5, 4], &factors(3, 4, 6), &["target_parameters", "order"]);
    refused(&[4, 5], &factors(1, 4, 5), &["target_parameters"]);
    refused(&[2, 5, 4], &factors(3, 4, 5), &["3 experts"]);
    refused(&[5, 4], &factors(3, 4, 5), &["3 experts"]);
    let mut other = factors(3, 4, 5);
    other.insert("m.w.lora_A".into(), tensor(1, &[3, 1, 4], DType::F32));
    refused(&[3, 5, 4], &other, &["r = 2"]);
    let base = StateDict::from([("m.w.weight".to_owned(), tensor(3, &[5, 4], DType::F32))]);
    let adapter = LoraWeights::new(config(None), factors(1, 4, 5)).unwrap();
    let error = merge_into(&base, &adapter).unwrap_err().to_string();
    assert!(error.contains("\"m.w\"") && error.contains("the base does not have it"), "{error}");
    // Their ranks are not in a row, and have no sum by concatenation.
    let adapter = LoraWeights::new(config(None), factors(3, 4, 5)).unwrap();
    let error = add_weighted(&[(&adapter, 1.), (&adapter, 1.)]).unwrap_err().to_string();
    assert!(error.contains("m.w.lora_A"), "{error}");
}

#[test]
fn biases_are_added_and_rows_replaced() -> lora::Result<()> {
    let tensors = [
        ("q.lora_A", tensor(1, &[2, 4], DType::F32)),
        ("q.lora_B", tensor(2, &[5, 2], DType::F32)),
        ("q.lora_bias", tensor(3, &[5], DType::F32)),
        ("t.trainable_tokens", tensor(4, &[2, 3], DType::F32)),
    ];
    let adapter: StateDict =
        tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    for dtype in [DType::F32, DType::F16] {
        let base = StateDict::from([
            ("q.weight".to_owned(), tensor(5, &[5, 4], dtype)),
            ("q.bias".to_owned(), tensor(6, &[5], dtype)),
            ("t.weight".to_owned(), tensor(7, &[6, 3], dtype)),
        ]);
        let mut config = AdapterConfig::from(cfg());
        config.trainable_token_indices.insert("t".to_owned(), vec![4, 0]);
        let merged = merge_into(&base, &LoraWeights::new(&config, adapter.clone())?)?;
        let exact = (base["q.bias"].to_dtype(DType::F64)?
            + (adapter["q.lora_bias"].to_dtype(DType::F64)? * 1.5)?)?;
        assert_eq!(bits(&merged["q.bias"])?, bits(&exact.to_dtype(dtype)?)?, "rounded once");
        for row in 0..6 {
            let expected = match row {
                4 => adapter["t.trainable_tokens"].get(0)?.to_dtype(dtype)?,
                0 => adapter["t.trainable_tokens"].get(1)?.to_dtype(dtype)?,
                row => base["t.weight"].get(row)?,
            };
            assert_eq!(bits(&merged["t.weight"].get(row)?)?, bits(&expected)?, "{row}");
        }
        let refused = |base: &StateDict, config: &AdapterConfig, words: &[&str]| {
            let weights = LoraWeights::new(config, adapter.clone());
            let merged = weights.and_then(|weights| merge_into(base, &weights));
            let error = merged.unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        let mut beyond = config.clone();
        beyond.trainable_token_indices.insert("t".to_owned(), vec![1, 6]);
        refused(&base, &beyond, &["t.weight", "token 6", "6 rows"]);
        beyond.trainable_token_indices.insert("t".to_owned(), vec![1]);
        refused(&base, &beyond, &["t.trainable_tokens", "1 token indices"]);
        beyond.trainable_token_indices.clear();
        refused(&base, &beyond, &["t.trainable_tokens", "trainable_token_indices"]);
        let mut without = base.clone();
        without.remove("q.bias");
        refused(&without, &config, &["q.bias", "the base does not have it"]);
    }
    Ok(())
}
