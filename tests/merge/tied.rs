//! Heads that are tied to the embeddings, as PEFT writes their changes with `ensure_weight_tying`.

use crate::common::{bits, difference};
use crate::{cfg, tensor, CPU};
use candle_core::{DType, Tensor};
use lora::adapter::AdapterConfig;
use lora::layers::LayerKind;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::LoraWeights;
use loralib as lora;

fn config() -> AdapterConfig {
    AdapterConfig::from(cfg())
        .with_layer("embed", LayerKind::Embedding)
        .with_layer("head", LayerKind::Linear)
}

#[test]
fn the_copy_of_a_tied_head_is_passed_over() -> lora::Result<()> {
    let base: StateDict = [("embed.weight".to_owned(), tensor(1, &[7, 4], DType::F32))].into();
    let (a, b) = (tensor(2, &[2, 7], DType::F32), tensor(3, &[4, 2], DType::F32));
    let adapter = |head_a: Tensor, head_b: Tensor| -> StateDict {
        let all = [
            ("embed.lora_A", &a),
            ("embed.lora_B", &b),
            ("head.lora_A", &head_a),
            ("head.lora_B", &head_b),
        ];
        all.map(|(name, tensor)| (name.to_owned(), tensor.clone())).into()
    };
    let tied = adapter(b.t()?.contiguous()?, a.t()?.contiguous()?);
    let alone = tied.clone().into_iter().filter(|(name, _)| name.starts_with("embed")).collect();
    let only = AdapterConfig::from(cfg()).with_layer("embed", LayerKind::Embedding);
    let expected = merge_into(&base, &LoraWeights::new(only, alone)?)?;
    let weights = LoraWeights::new(config(), tied.clone())?;
    let merged = merge_into(&base, &weights)?;
    assert!(merged.keys().eq(base.keys()));
    assert_eq!(bits(&merged["embed.weight"])?, bits(&expected["embed.weight"])?);
    // Over a base with a head of its own it is an update like others.
    let untied: StateDict = [("head.weight".to_owned(), base["embed.weight"].clone())].into();
    let untied = base.clone().into_iter().chain(untied).collect();
    let merged = merge_into(&untied, &weights)?;
    assert!(difference(&merged["head.weight"], &expected["embed.weight"])? < 1e-6);
    let mut dora = tied;
    for (path, n) in [("embed", 4), ("head", 7)] {
        dora.insert(format!("{path}.lora_magnitude_vector"), tensor(4, &[n], DType::F32));
    }
    let mut with_dora = config();
    with_dora.lora.use_dora = true;
    let error = merge_into(&base, &LoraWeights::new(with_dora, dora)?).unwrap_err().to_string();
    assert!(error.contains("head.weight"), "{error}");
    let other = adapter((b.t()? * 2.)?, a.t()?.contiguous()?);
    let error = merge_into(&base, &LoraWeights::new(config(), other)?).unwrap_err().to_string();
    assert!(error.contains("head.weight") && error.contains("does not have it"), "{error}");
    Ok(())
}

#[test]
fn the_table_of_a_tied_head_is_passed_over() -> lora::Result<()> {
    let base: StateDict = [("embed.weight".to_owned(), tensor(1, &[7, 4], DType::F32))].into();
    let table = tensor(2, &[7, 4], DType::F32);
    let adapter = |head: Tensor| {
        let tensors =
            [("embed.weight".to_owned(), table.clone()), ("head.weight".to_owned(), head)];
        LoraWeights::new(AdapterConfig::default(), tensors.into())
    };
    let merged = merge_into(&base, &adapter(table.copy()?)?)?;
    assert_eq!(bits(&merged["embed.weight"])?, bits(&table)?);
    let other = adapter(Tensor::zeros((7, 4), DType::F32, &CPU)?)?;
    assert!(merge_into(&base, &other).is_err());
    Ok(())
}
