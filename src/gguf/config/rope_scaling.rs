//! `rope_scaling`: how a model stretches its rotary embedding beyond the context it was trained with.

use super::keys::Keys;
use crate::gguf::metadata::required;
use crate::{Error, Result};
use serde_json::{json, Value};
use std::f64::consts::TAU;

/// Llama 3's constants, which are the same in all its models and which no file tells.
const LOW_FREQ_FACTOR: f64 = 1.;
const HIGH_FREQ_FACTOR: f64 = 4.;
const ORIGINAL_CONTEXT: f64 = 8192.;

/// Keys that change YaRN's or the attention's scale beyond what the factor gives.
const ATTENTION_KEYS: [&str; 6] = [
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
];

/// Null without scaling. `rope_freqs` are the divisors of the frequencies, one for each pair of a head's
/// dimensions.
pub(super) fn rope_scaling(
    keys: &Keys,
    theta: f64,
    head_dim: usize,
    rope_freqs: Option<&[f32]>,
) -> Result<Value> {
    let context = keys.size("context_length")?;
    let original = keys.optional_size("rope.scaling.original_context_length")?.unwrap_or(context);
    if let Some(key) =
        ATTENTION_KEYS.iter().find(|key| keys.metadata.get(&keys.name(key)).is_some())
    {
        return Err(unsupported(format!("the key {:?} is set", keys.name(key))));
    }
    // As llama.cpp: a factor without a type is linear, and so is the older key.
    let kind = keys.string("rope.scaling.type")?.unwrap_or("linear");
    let factor = keys.float("rope.scaling.factor")?;
    let factor = factor.or(keys.float("rope.scale_linear")?).filter(|f| *f != 0.);
    match (kind, rope_freqs) {
        ("none", None) => Ok(Value::Null),
        ("linear", None) if keys.architecture == "phi3" && original != context => {
            Err(unsupported(format!("{original} positions became {context} by unknown factors")))
        }
        ("linear", None) => match factor {
            None | Some(1.) => Ok(Value::Null),
            Some(factor) => Ok(json!({ "rope_type": "linear", "factor": factor })),
        },
        ("yarn", None) => Ok(json!({
            "rope_type": "yarn",
            "factor": required(&keys.name("rope.scaling.factor"), factor)?,
            "original_max_position_embeddings": original,
        })),
        ("none" | "linear", Some(divisors)) if matches!(factor, None | Some(1.)) => {
            llama3(keys.architecture, theta, head_dim, divisors)
        }
        (kind, Some(_)) => {
            Err(unsupported(format!("the type is {kind:?}, with rope_freqs.weight")))
        }
        (kind, None) => Err(unsupported(format!("the type is {kind:?}"))),
    }
}

fn unsupported(reason: impl ToString) -> Error {
    Error::unsupported("this file's scaling of the rotary embedding", reason)
}

/// The scaling whose divisors these are.
fn llama3(architecture: &str, theta: f64, head_dim: usize, divisors: &[f32]) -> Result<Value> {
    if architecture != "llama" {
        return Err(unsupported(format!("{architecture} with rope_freqs.weight")));
    }
    let factor = divisors.iter().fold(0., |a: f64, b| a.max((*b).into()));
    // Not more than the file has, whatever size it tells.
    let expected: Vec<f64> = (0..(head_dim / 2).min(divisors.len() + 1))
        .map(|i| divisor(factor, TAU * theta.powf((2 * i) as f64 / head_dim as f64)))
        .collect();
    let agrees = |(a, b): (&f64, &f32)| (a - f64::from(*b)).abs() <= 1e-4 * a;
    // Without a pair there is no factor either.
    let same_number = !divisors.is_empty() && expected.len() == divisors.len();
    if !same_number || !expected.iter().zip(divisors).all(agrees) {
        return Err(unsupported(format!(
            "rope_freqs.weight has {} divisors, which are not Llama 3's {} for a factor of {factor}",
            divisors.len(),
            expected.len(),
        )));
    }
    Ok(match factor == 1. {
        true => Value::Null,
        false => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LOW_FREQ_FACTOR,
            "high_freq_factor": HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": ORIGINAL_CONTEXT as usize,
        }),
    })
}

/// Llama 3's divisor of a frequency: 1 for short wavelengths, `factor` for long ones, between them
/// interpolated in the frequency.
fn divisor(factor: f64, wavelength: f64) -> f64 {
    let turns = ORIGINAL_CONTEXT / wavelength;
    let kept = (turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR);
    let kept = kept.clamp(0., 1.);
    1. / ((1. - kept) / factor + kept)
}
