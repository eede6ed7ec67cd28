//! Adapters are combined as PEFT combines them, and an adapter of another rank is the nearest one.

use crate::lora;
use candle_core::{DType, Device, Tensor};
use lora::merge::{add_weighted_with, merge_into, AddWeightedConfig};
use lora::merge::{CombinationType, MajoritySignMethod};
use lora::utils::StateDict;
use lora::LoraWeights;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/combined", name].iter().collect()
}

fn adapter(name: &str) -> lora::Result<LoraWeights> {
    lora::formats::peft::load(path(name), &Device::Cpu)
}

/// PEFT's ΔW by type and layer.
fn expected() -> lora::Result<StateDict> {
    Ok(lora::read_state_dict(path("expected.safetensors"), &Device::Cpu)?.tensors)
}

/// ΔW of each layer, in F64.
fn updates(weights: &LoraWeights) -> lora::Result<StateDict> {
    let zeros = |path: &str| {
        let own = expected()?;
        let shape =
            own.iter().find(|(name, _)| name.split_once('.').is_some_and(|(_, of)| of == path));
        let shape = shape.map(|(_, t)| t.shape().clone()).unwrap_or(().into());
        Ok::<_, lora::Error>(Tensor::zeros(shape, DType::F64, &Device::Cpu)?)
    };
    let base = weights.layers().map(|(path, _)| Ok((format!("{path}.weight"), zeros(path)?)));
    let base = base.collect::<lora::Result<StateDict>>()?;
    let merged = merge_into(&base, weights)?;
    Ok(merged
        .into_iter()
        .map(|(name, t)| (name.trim_end_matches(".weight").to_owned(), t))
        .collect())
}

fn apart(a: &Tensor, b: &Tensor) -> lora::Result<f64> {
    let difference = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?;
    Ok(difference.abs()?.max_all()?.to_scalar()?)
}

fn norm(t: &Tensor) -> lora::Result<f64> {
    Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

fn config(combination_type: CombinationType, density: Option<f64>) -> AddWeightedConfig {
    AddWeightedConfig { combination_type, density, ..Default::default() }
}

#[test]
fn every_combination_is_peft_s() -> lora::Result<()> {
    use CombinationType::*;
    let (one, two, wide) = (adapter("one")?, adapter("two")?, adapter("wide")?);
    let frequency = |of: CombinationType| AddWeightedConfig {
        majority_sign_method: MajoritySignMethod::Frequency,
        ..config(of, Some(0.6))
    };
    let all = expected()?;
    let mut compared = 0;
    for (name, other, cfg) in [
        ("cat", &wide, config(Cat, None)),
        ("svd", &wide, AddWeightedConfig::default()),
        ("svd2", &two, AddWeightedConfig { svd_rank: Some(2), ..Default::default() }),
        ("linear", &two, config(Linear, None)),
        ("ties", &two, config(Ties, Some(0.6))),
        ("ties_svd", &two, config(TiesSvd, Some(0.6))),
        ("magnitude_prune", &two, config(MagnitudePrune, Some(0.6))),
        ("magnitude_prune_svd", &two, config(MagnitudePruneSvd, Some(0.6))),
        ("ties/frequency", &two, frequency(Ties)),
        ("ties_svd/frequency", &two, frequency(TiesSvd)),
    ] {
        let sum = add_weighted_with(&[(&one, 0.7), (other, -0.4)], &cfg)?;
        for (path, update) in updates(&sum)? {
            let expected = &all[&format!("{name}.{path}")];
            assert!(apart(&update, expected)? < 2e-6, "{name} {path}: {update} {expected}");
            compared += 1;
        }
    }
    assert_eq!(compared, all.len());
    Ok(())
}

#[test]
fn random_pruning_keeps_a_share_and_the_expected_value() -> lora::Result<()> {
    let (one, two) = (adapter("one")?, adapter("two")?);
    let sum = |of: CombinationType, density: f64, seed: u64| {
        let cfg = AddWeightedConfig { seed, ..config(of, Some(density)) };
        add_weighted_with(&[(&one, 1.), (&two, 1.)], &cfg)
    };
    // Nothing is pruned at 1.
    for (random, plain, density) in [
        (CombinationType::DareLinear, CombinationType::Linear, None),
        (CombinationType::DareTies, CombinationType::Ties, Some(1.)),
        (CombinationType::DareLinearSvd, CombinationType::Svd, None),
        (CombinationType::DareTiesSvd, CombinationType::TiesSvd, Some(1.)),
    ] {
        let expected = add_weighted_with(&[(&one, 1.), (&two, 1.)], &config(plain, density))?;
        let (found, expected) = (updates(&sum(random, 1., 3)?)?, updates(&expected)?);
        for (path, update) in found {
            assert!(apart(&update, &expected[&path])? < 1e-12, "{random:?} {path}");
        }
    }
    // Of one factor the mean over seeds is the factor itself, and each seed has its own values.
    let of = |seed: u64| -> lora::Result<Tensor> {
        Ok(sum(CombinationType::DareLinear, 0.5, seed)?.state_dict()["linear.lora_A"].clone())
    };
    let plain =
        add_weighted_with(&[(&one, 1.), (&two, 1.)], &config(CombinationType::Linear, None))?;
    let plain = &plain.state_dict()["linear.lora_A"];
    let all = (0..600).map(of).collect::<lora::Result<Vec<_>>>()?;
    assert!(apart(&all[0], &all[1])? > 0.1);
    assert_eq!(apart(&all[0], &of(0)?)?, 0.);
    let mean = Tensor::stack(&all, 0)?.mean(0)?;
    assert!(apart(&mean, plain)? < 0.25, "{mean} {plain}");
    Ok(())
}

#[test]
fn a_resized_adapter_is_the_nearest_of_its_rank() -> lora::Result<()> {
    let one = adapter("one")?;
    let whole = updates(&one)?;
    let mut last = std::collections::BTreeMap::<String, f64>::new();
    for rank in 1..=5 {
        let resized = one.resized(rank)?;
        for (path, update) in updates(&resized.weights)? {
            let was = &whole[&path];
            let lost = norm(&(was - &update)?)?.powi(2) / norm(was)?.powi(2);
            let kept = resized.kept[&path];
            assert!((1. - lost - kept).abs() < 1e-6, "{path} {rank}: {kept} {lost}");
            assert!(kept > last.get(&path).copied().unwrap_or(0.) || kept > 1. - 1e-12);
            last.insert(path.clone(), kept);
            if rank >= 3 {
                assert!(apart(&update, was)? < 1e-6, "{path} {rank}");
            }
        }
        let scaling = |own: &LoraWeights| own.lora_config("linear").map(|cfg| cfg.scaling());
        assert_eq!(scaling(&resized.weights), scaling(&one));
    }
    // As a PEFT folder it has the rank that was asked for.
    let dir = tempfile::tempdir()?;
    lora::formats::peft::save(dir.path(), &one.resized(2)?.weights)?;
    let again = lora::formats::peft::load(dir.path(), &Device::Cpu)?;
    for (path, update) in updates(&again)? {
        assert!(apart(&update, &updates(&one.resized(2)?.weights)?[&path])? < 1e-6, "{path}");
    }
    assert_eq!(again.config().lora.r, 2);
    Ok(())
}

#[test]
fn what_cannot_be_combined_is_told_by_name() -> lora::Result<()> {
    use CombinationType::*;
    let (one, wide) = (adapter("one")?, adapter("wide")?);
    let says = |cfg: AddWeightedConfig, expected: &str| {
        let error = add_weighted_with(&[(&one, 1.), (&wide, 1.)], &cfg).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    says(config(Linear, None), "its rank is 3 in one adapter and 4 in another");
    says(config(Ties, None), "Ties needs a density");
    says(config(Svd, Some(0.5)), "Svd has no density");
    says(config(TiesSvd, Some(1.5)), "the density is 1.5");
    says(config(TiesSvd, Some(f64::NAN)), "the density is NaN");
    says(config(DareLinearSvd, Some(0.)), "a density of 0");
    let ranked = |svd_rank, of| AddWeightedConfig { svd_rank: Some(svd_rank), ..config(of, None) };
    says(ranked(0, Svd), "svd_rank is 0");
    says(ranked(2, Linear), "Linear has no svd_rank");
    says(ranked(6, Svd), "svd_rank is 6, its matrix is 5 by");
    for (rank, expected) in [(0, "cannot be 0"), (6, "cannot be 6: expected 1 to 5")] {
        let error = one.resized(rank).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("lora_A"), "{error}");
    }
    Ok(())
}
