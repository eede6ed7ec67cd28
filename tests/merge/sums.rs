//! Weighted sums of adapters.

use crate::common::difference;
use crate::tensor;
use candle_core::DType;
use lora::adapter::AdapterConfig;
use lora::layers::LayerKind;
use lora::merge::{add_weighted, merge_into};
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;

#[test]
fn weighted_sum_adds_the_updates() -> lora::Result<()> {
    let weights = [(0.7, 2usize, 10u64), (-0.4, 3, 20), (1.5, 1, 30)];
    let config = |r: usize| {
        // One scaling for all: 1.5.
        AdapterConfig::from(LoraConfig { r, lora_alpha: 1.5 * r as f64, ..Default::default() })
            .with_layer("qkv", LayerKind::MergedLinear(vec![true, false, true]))
    };
    let base: StateDict = [("q", [6, 4]), ("qkv", [9, 4])]
        .map(|(path, dims)| (format!("{path}.weight"), tensor(1, &dims, DType::F64)))
        .into();
    let adapters: Vec<LoraWeights> = weights
        .iter()
        .map(|&(_, r, seed)| {
            let all = [
                ("q.lora_A", [r, 4]),
                ("q.lora_B", [6, r]),
                ("qkv.lora_A", [2 * r, 4]),
                ("qkv.lora_B", [6, r]),
            ];
            let all = all.iter().enumerate();
            let named = |(i, (n, d)): (usize, &(&str, [usize; 2]))| {
                (n.to_string(), tensor(seed + i as u64, d, DType::F64))
            };
            LoraWeights::new(config(r), all.map(named).collect())
        })
        .collect::<lora::Result<_>>()?;
    let pairs: Vec<_> = adapters.iter().zip(weights).map(|(a, (w, ..))| (a, w)).collect();
    let sum = add_weighted(&pairs)?;
    assert_eq!(sum.state_dict()["qkv.lora_A"].dims(), [12, 4]);
    let merged = merge_into(&base, &sum)?;
    for (name, w) in &base {
        let mut expected = w.clone();
        for (adapter, weight) in &pairs {
            let own = merge_into(&base, adapter)?;
            expected = (expected + ((&own[name] - w)? * *weight)?)?;
        }
        assert!(difference(&merged[name], &expected)? < 1e-14, "{name}");
    }
    let mut other = adapters[1].state_dict();
    other.remove("q.lora_A");
    assert!(LoraWeights::new(config(3), other.clone()).is_err());
    other.remove("q.lora_B");
    // A layer that an adapter does not have has no update there.
    let other = LoraWeights::new(config(3), other)?;
    let sum = add_weighted(&[(&other, 1.), (&adapters[0], 2.)])?;
    let (sum, own) = (merge_into(&base, &sum)?, merge_into(&base, &adapters[0])?);
    let expected = (&base["q.weight"] + ((&own["q.weight"] - &base["q.weight"])? * 2.)?)?;
    assert!(difference(&sum["q.weight"], &expected)? < 1e-14);
    assert!(add_weighted(&[(&adapters[0], f64::NAN)]).is_err());
    assert!(add_weighted(&[]).is_err());
    Ok(())
}
