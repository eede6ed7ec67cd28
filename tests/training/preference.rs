//! Preference losses are TRL's, with their gradients and rewards.

use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use loralib::train::*;
use serde_json::Value;

fn cases(of: &str) -> Result<Vec<Value>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/preference.json");
    let all: Vec<Value> = serde_json::from_slice(&std::fs::read(path)?)?;
    let cases: Vec<_> = all.into_iter().filter(|case| case["loss"] == of).collect();
    assert!(!cases.is_empty());
    Ok(cases)
}

fn number(case: &Value, name: &str) -> Result<f64> {
    Ok(case[name].as_f64().ok_or_else(|| format!("{name}: {}", case[name]))?)
}

/// A vector or a matrix.
fn tensor(case: &Value, name: &str) -> Result<Option<Tensor>> {
    let Some(rows) = case[name].as_array() else { return Ok(None) };
    let shape = match rows[0].as_array() {
        Some(row) => vec![rows.len(), row.len()],
        None => vec![rows.len()],
    };
    let flat = rows.iter().flat_map(|row| row.as_array().map_or(std::slice::from_ref(row), |r| r));
    let values: Option<Vec<f64>> = flat.map(Value::as_f64).collect();
    Ok(Some(Tensor::from_vec(values.ok_or("no numbers")?, shape, &Device::Cpu)?))
}

fn given(case: &Value, name: &str) -> Result<Tensor> {
    Ok(tensor(case, name)?.ok_or_else(|| format!("no {name}"))?)
}

/// The case in F64 as exactly as can be, and in F32.
fn dtypes() -> [(DType, f64); 2] {
    [(DType::F64, 1e-11), (DType::F32, 2e-5)]
}

fn assert_near(found: &Tensor, expected: &Tensor, tolerance: f64, what: &Value) -> Result<()> {
    let found = found.to_dtype(DType::F64)?;
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let allowed = (expected.abs()?.maximum(1.)? * tolerance)?;
    let apart = ((&found - expected)?.abs()? - allowed)?.flatten_all()?.max(0)?;
    assert!(apart.to_scalar::<f64>()? <= 0., "{found}, expected {expected}: {what}");
    Ok(())
}

/// Compares a loss, and the gradient of the log-probabilities that it is a function of.
fn assert_loss(case: &Value, policy: &Var, loss: &Tensor, tolerance: f64) -> Result<()> {
    let expected = Tensor::new(number(case, "expected")?, &Device::Cpu)?;
    assert_near(loss, &expected, tolerance, case)?;
    let grads = loss.backward()?;
    let grad = grads.get(policy).ok_or("no gradient")?;
    assert_near(grad, &given(case, "grad")?, tolerance, case)
}

fn rewards(of: &PreferenceLoss) -> Result<Tensor> {
    Ok(Tensor::cat(&[&of.chosen_rewards, &of.rejected_rewards], 0)?)
}

#[test]
fn dpo_is_trl_s() -> Result<()> {
    for case in cases("dpo")? {
        let cfg = DpoConfig {
            beta: number(&case, "beta")?,
            label_smoothing: number(&case, "label_smoothing")?,
            loss_type: match case["loss_type"].as_str() {
                Some("sigmoid") => DpoLossType::Sigmoid,
                Some("hinge") => DpoLossType::Hinge,
                Some("ipo") => DpoLossType::Ipo,
                Some("robust") => DpoLossType::Robust,
                other => panic!("{other:?}"),
            },
        };
        for (dtype, tolerance) in dtypes() {
            let policy = Var::from_tensor(&given(&case, "policy")?.to_dtype(dtype)?)?;
            let reference = PairLogProbs::split(&given(&case, "reference")?)?;
            let dpo = dpo_loss(&PairLogProbs::split(&policy)?, &reference, &cfg)?;
            // Of F32 the log-probabilities themselves are rounded.
            let tolerance = tolerance * if dtype == DType::F32 { 50. } else { 1. };
            assert_loss(&case, &policy, &dpo.loss, tolerance)?;
            assert_near(&rewards(&dpo)?, &given(&case, "rewards")?, tolerance, &case)?;
        }
    }
    Ok(())
}

#[test]
fn label_smoothing_is_the_mean_of_both_ways_round() -> Result<()> {
    let policy = Tensor::new(&[-3f64, -4., -9., -1.], &Device::Cpu)?;
    let (policy, reference) =
        (PairLogProbs::split(&policy)?, PairLogProbs::split(&policy.affine(0.9, -0.2)?)?);
    let swapped = |of: &PairLogProbs| PairLogProbs {
        chosen: of.rejected.clone(),
        rejected: of.chosen.clone(),
    };
    let loss = |policy: &PairLogProbs, reference: &PairLogProbs, label_smoothing| {
        let cfg = DpoConfig { label_smoothing, ..Default::default() };
        dpo_loss(policy, reference, &cfg)?.loss.to_scalar::<f64>()
    };
    let (plain, wrong) =
        (loss(&policy, &reference, 0.)?, loss(&swapped(&policy), &swapped(&reference), 0.)?);
    approx::assert_relative_eq!(
        loss(&policy, &reference, 0.3)?,
        0.7 * plain + 0.3 * wrong,
        max_relative = 1e-12
    );
    Ok(())
}

#[test]
fn orpo_is_trl_s() -> Result<()> {
    for case in cases("orpo")? {
        let policy = Var::from_tensor(&given(&case, "policy")?)?;
        let nll = Tensor::new(number(&case, "nll")?, &Device::Cpu)?;
        let orpo = orpo_loss(&PairLogProbs::split(&policy)?, &nll, number(&case, "beta")?)?;
        // The gradient of a mean log-probability of -1e-6 is 1e5 times as large as the others.
        assert_loss(&case, &policy, &orpo.loss, 1e-9)?;
        assert_near(&rewards(&orpo)?, &given(&case, "rewards")?, 1e-12, &case)?;
    }
    Ok(())
}

#[test]
fn kto_is_trl_s() -> Result<()> {
    for case in cases("kto")? {
        let cfg = KtoConfig {
            beta: number(&case, "beta")?,
            desirable_weight: number(&case, "desirable_weight")?,
            undesirable_weight: number(&case, "undesirable_weight")?,
        };
        let desirable = case["desirable"].as_array().ok_or("no desirable")?;
        let desirable: Vec<_> = desirable.iter().filter_map(Value::as_bool).collect();
        for (dtype, tolerance) in dtypes() {
            let policy = Var::from_tensor(&given(&case, "policy")?.to_dtype(dtype)?)?;
            let reference = given(&case, "reference")?;
            let kto = kto_loss(&policy, &reference, &desirable, number(&case, "kl")?, &cfg)?;
            assert_loss(&case, &policy, &kto.loss, tolerance)?;
            assert_near(&kto.rewards, &given(&case, "rewards")?, tolerance, &case)?;
        }
    }
    Ok(())
}

#[test]
fn grpo_is_trl_s() -> Result<()> {
    for case in cases("grpo")? {
        let option = |name: &str| case[name].as_f64();
        let max_completion_length = number(&case, "max_completion_length")? as usize;
        let cfg = GrpoConfig {
            beta: number(&case, "beta")?,
            epsilon: number(&case, "epsilon")?,
            epsilon_high: option("epsilon_high"),
            delta: option("delta"),
            loss_type: match case["loss_type"].as_str() {
                Some("dapo") => GrpoLossType::Dapo,
                Some("grpo") => GrpoLossType::Grpo,
                Some("dr_grpo") => GrpoLossType::DrGrpo { max_completion_length },
                other => panic!("{other:?}"),
            },
            importance_sampling_level: match case["importance_sampling_level"].as_str() {
                Some("token") => ImportanceSamplingLevel::Token,
                Some("sequence") => ImportanceSamplingLevel::Sequence,
                other => panic!("{other:?}"),
            },
        };
        let scale = match case["scale"].as_str() {
            Some("group") => ScaleRewards::Group,
            Some("batch") => ScaleRewards::Batch,
            _ => ScaleRewards::None,
        };
        let rewards = given(&case, "reward")?.to_vec1::<f64>()?;
        let generations = number(&case, "num_generations")? as usize;
        let advantages = group_advantages(&rewards, generations, scale)?;
        let advantages = Tensor::new(advantages, &Device::Cpu)?;
        assert_near(&advantages, &given(&case, "advantages")?, 1e-12, &case)?;
        for (dtype, tolerance) in dtypes() {
            let policy = Var::from_tensor(&given(&case, "policy")?.to_dtype(dtype)?)?;
            let (old, reference) = (tensor(&case, "old")?, tensor(&case, "reference")?);
            let batch = GrpoBatch {
                log_probs: &policy,
                old: old.as_ref(),
                reference: reference.as_ref(),
                mask: &given(&case, "mask")?,
                advantages: &advantages,
            };
            assert_loss(&case, &policy, &grpo_loss(&batch, &cfg)?, tolerance)?;
        }
    }
    Ok(())
}

#[test]
fn bad_input_is_told_by_name() -> Result<()> {
    let vector = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu);
    let pairs = |chosen: usize, rejected: usize| -> Result<PairLogProbs> {
        Ok(PairLogProbs { chosen: vector(chosen)?, rejected: vector(rejected)? })
    };
    let two = pairs(2, 2)?;
    let dpo = |policy: &PairLogProbs, reference: &PairLogProbs, cfg: DpoConfig| {
        dpo_loss(policy, reference, &cfg).unwrap_err().to_string()
    };
    let cfg = DpoConfig::default();
    assert!(dpo(&pairs(0, 0)?, &two, cfg).contains("at least one"));
    assert!(dpo(&pairs(2, 3)?, &two, cfg).contains("[3]"));
    assert!(dpo(&two, &pairs(3, 3)?, cfg).contains("the reference's [3]"));
    assert!(dpo(&two, &two, DpoConfig { beta: 0., ..cfg }).contains("beta is 0"));
    let half = DpoConfig { label_smoothing: 0.5, ..cfg };
    assert!(dpo(&two, &two, half).contains("label_smoothing is 0.5"));
    let hinge = DpoConfig { label_smoothing: 0.1, loss_type: DpoLossType::Hinge, ..cfg };
    assert!(dpo(&two, &two, hinge).contains("Hinge"));
    assert!(PairLogProbs::split(&vector(3)?).unwrap_err().to_string().contains('3'));
    let kl = kto_loss(&vector(2)?, &vector(2)?, &[true, false], f64::NAN, &KtoConfig::default());
    assert!(kl.unwrap_err().to_string().contains("kl is NaN"));
    let counts = kto_loss(&vector(2)?, &vector(2)?, &[true], 0., &KtoConfig::default());
    assert!(counts.unwrap_err().to_string().contains("desirable [1]"));
    let alone = group_advantages(&[1., 2.], 1, ScaleRewards::Group).unwrap_err().to_string();
    assert!(alone.contains("num_generations is 1"), "{alone}");
    assert!(group_advantages(&[1., 2., 3.], 2, ScaleRewards::Group).is_err());
    let nan = group_advantages(&[1., f64::NAN], 2, ScaleRewards::Group).unwrap_err().to_string();
    assert!(nan.contains("reward 1 is NaN"), "{nan}");
    let (log_probs, mask) =
        (vector(6)?.reshape((2, 3))?, Tensor::zeros((2, 3), DType::U8, &Device::Cpu)?);
    let advantages = vector(2)?;
    let batch = GrpoBatch {
        log_probs: &log_probs,
        old: None,
        reference: None,
        mask: &mask,
        advantages: &advantages,
    };
    let grpo = |batch: GrpoBatch, cfg: GrpoConfig| grpo_loss(&batch, &cfg).unwrap_err().to_string();
    assert!(grpo(batch, GrpoConfig::default()).contains("the mask is all 0"));
    let ones = mask.ones_like()?;
    let batch = GrpoBatch { mask: &ones, ..batch };
    let with_kl = GrpoConfig { beta: 0.1, ..Default::default() };
    assert!(grpo(batch, with_kl).contains("without a reference"));
    let wrong = vector(3)?;
    assert!(grpo(GrpoBatch { advantages: &wrong, ..batch }, with_kl).contains("advantages is [3]"));
    assert!(grpo(GrpoBatch { old: Some(&wrong), ..batch }, with_kl).contains("old [3]"));
    Ok(())
}
