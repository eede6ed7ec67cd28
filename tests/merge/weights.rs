//! Merged weights, and errors that name the tensor.

use crate::common::{bits, difference};
use crate::{cfg, model, CPU};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use lora::adapter::AdapterConfig;
use lora::layers::LayerKind;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;

#[test]
fn merged_weight_is_that_of_the_layer() -> lora::Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let (base, adapter) = model(dtype);
        let merged = merge_into(&base, &adapter)?;
        assert!(merged.keys().eq(base.keys()));
        for (name, t) in &merged {
            assert_eq!((t.dtype(), t.dims()), (base[name].dtype(), base[name].dims()), "{name}");
            if !name.starts_with("a.") {
                assert_eq!(bits(t)?, bits(&base[name])?, "{name}");
            }
        }
        let adapter = adapter.state_dict();
        let all = base.iter().chain(&adapter).map(|(n, t)| (n.clone(), t.clone()));
        let vb = VarBuilder::from_tensors(all.collect(), dtype, &CPU);
        let cfg = LoraConfig { lora_dtype: Some(DType::F32), ..cfg() };
        let layer = lora::linear_no_bias(4, 5, cfg, vb.pp("a"))?;
        assert_eq!(bits(&merged["a.weight"])?, bits(&layer.merged_weight()?)?, "{dtype:?}");
        assert_eq!(bits(&merged["a.bias"])?, bits(&adapter["a.bias"].to_dtype(dtype)?)?);
    }
    Ok(())
}

#[test]
fn transposed_weights_and_second_names_are_found() -> lora::Result<()> {
    let (base, adapter) = model(DType::F32);
    let expected = merge_into(&base, &adapter)?["a.weight"].clone();
    let mut transposed = base.clone();
    transposed.insert("a.weight".into(), base["a.weight"].t()?.contiguous()?);
    let merged = merge_into(&transposed, &adapter)?;
    assert_eq!(difference(&merged["a.weight"].t()?, &expected)?, 0.);
    let mut second = base;
    let (w, b) = (second.remove("a.weight").unwrap(), second.remove("a.bias").unwrap());
    second.insert("a.conv.weight".into(), w);
    second.insert("a.conv.bias".into(), b);
    let merged = merge_into(&second, &adapter)?;
    assert_eq!(difference(&merged["a.conv.weight"], &expected)?, 0.);
    assert_eq!(bits(&merged["a.conv.bias"])?, bits(&adapter.state_dict()["a.bias"])?);
    Ok(())
}

#[test]
fn errors_name_the_tensor() {
    let (base, adapter) = model(DType::F32);
    let adapter = adapter.state_dict();
    let refused = |adapter: &StateDict, cfg: AdapterConfig| {
        let weights = LoraWeights::new(cfg, adapter.clone());
        weights.and_then(|weights| merge_into(&base, &weights)).unwrap_err().to_string()
    };
    let with = |name: &str, t: Tensor| {
        let mut adapter = adapter.clone();
        adapter.insert(name.into(), t);
        adapter
    };
    let plain = || AdapterConfig::from(cfg());
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &CPU).unwrap();
    assert!(refused(&with("head.weight", zeros(&[2])), plain()).contains("head.weight"));
    let pefts = "base_model.model.a.lora_A.weight";
    assert!(refused(&with(pefts, zeros(&[2, 4])), plain()).contains("`formats::peft::load`"));
    assert!(refused(&with("x.lora_A", zeros(&[2, 4])), plain()).contains("x.lora_A"));
    let compiled = refused(&with("_orig_mod.head.weight", zeros(&[2])), plain());
    assert!(compiled.contains("\"_orig_mod.head.weight\"") && compiled.contains("torch.compile"));
    assert!(refused(&with("a.bias", zeros(&[2])), plain()).contains("a.bias"));
    assert!(refused(&with("a.lora_A", zeros(&[2, 3])), plain()).contains("a.weight"));
    assert!(refused(&with("a.lora_B", zeros(&[4, 2])), plain()).contains("a.weight"));
    assert!(refused(&with("a.weight", zeros(&[5, 4])), plain()).contains("a.weight"));
    let nan = Tensor::full(f32::NAN, (2, 4), &CPU).unwrap();
    assert!(refused(&with("a.lora_A", nan), plain()).contains("a.weight"));
    assert!(refused(&StateDict::new(), plain()).contains("empty"));
    assert!(refused(&adapter, LoraConfig { r: 0, ..cfg() }.into()).contains("r = 0"));
    for (r, name) in [(1, "a.weight"), (4, "a.lora_A")] {
        let error = refused(&adapter, LoraConfig { r, ..cfg() }.into());
        let words = format!("rank is 2, the configuration has r = {r}");
        assert!(error.contains(name) && error.contains(&words), "{error}");
    }
    assert!(refused(&adapter, plain().with_layer("b", LayerKind::Embedding)).contains("b.lora_A"));
    let conv = refused(&adapter, plain().with_layer("a", LayerKind::Conv2d { groups: 2 }));
    assert!(conv.contains("not that of a Conv2d"), "{conv}");
}

/// The factors of a convolution with a kernel of 1 are those of a linear layer, as of a transformer's `proj_in`.
#[test]
fn a_pointwise_convolution_and_a_linear_layer_merge_each_other_s_factors() -> lora::Result<()> {
    let (mut base, adapter) = model(DType::F32);
    let declared = |kind| {
        LoraWeights::new(AdapterConfig::from(cfg()).with_layer("a", kind), adapter.state_dict())
    };
    let expected = merge_into(&base, &declared(LayerKind::Linear)?)?["a.weight"].clone();
    for kind in [LayerKind::Conv1d { groups: 1 }, LayerKind::Conv2d { groups: 1 }] {
        let merged = merge_into(&base, &declared(kind)?)?;
        assert_eq!(bits(&merged["a.weight"])?, bits(&expected)?);
    }
    let kernel = base["a.weight"].reshape((5, 4, 1, 1))?;
    base.insert("a.weight".into(), kernel);
    let merged = &merge_into(&base, &declared(LayerKind::Linear)?)?["a.weight"];
    assert_eq!(merged.dims(), [5, 4, 1, 1]);
    assert_eq!(bits(&merged.flatten_from(1)?)?, bits(&expected)?);
    Ok(())
}
