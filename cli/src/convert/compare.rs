//! Compares an adapter with what was read of its conversion.

use super::Adapter;
use crate::Result;
use candle_core::{DType, Device, Tensor};
use lora::layers::LayerKind;
use lora::{LayerConfig, LoraConfig, StateDict};
use loralib as lora;
use std::fmt;

/// The largest difference of an update, relative to its largest value.
const MOST: f64 = 2e-6;

pub enum Verdict {
    /// Factors are equal bit for bit, and scalings to 15 digits.
    Equal,
    /// The same, but of another dtype.
    OtherDtype,
    /// The updates are equal, from other factors.
    SameUpdate,
    /// The updates differ by this much of their largest value.
    Rounded(f64),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Equal => f.write_str(
                "lossless: the same factors bit for bit, and the same scalings to 15 digits",
            ),
            Self::OtherDtype => f.write_str(
                "lossless: the same values of factors in another dtype, and the same scalings to 15 digits",
            ),
            Self::SameUpdate => f.write_str("lossless: other factors with the same update"),
            Self::Rounded(apart) => write!(f, "rounded: updates differ by {apart:.1e}"),
        }
    }
}

pub fn compare(before: &Adapter, after: &Adapter) -> Result<Verdict> {
    if same_values(&before.1, &after.1)? == Some(0.) {
        let scaling = |adapter: &Adapter, path: &str| adapter.0.lora_config(path).scaling();
        let mut paths = before.1.keys().filter_map(|name| name.strip_suffix(".lora_A"));
        let equal = |path| {
            let (a, b): (f64, f64) = (scaling(before, path), scaling(after, path));
            (a - b).abs() <= 4. * f64::EPSILON * a.abs()
        };
        if paths.all(equal) {
            let dtypes = |(_, tensors): &Adapter| -> Vec<_> {
                tensors.values().map(Tensor::dtype).collect()
            };
            return Ok(match dtypes(before) == dtypes(after) {
                true => Verdict::Equal,
                false => Verdict::OtherDtype,
            });
        }
    }
    match same_values(&updates(before)?, &updates(after)?)? {
        Some(0.) => Ok(Verdict::SameUpdate),
        Some(apart) if apart <= MOST => Ok(Verdict::Rounded(apart)),
        Some(apart) => Err(format!("the conversion changes the update by {apart:.1e}").into()),
        None => Err("the conversion changes the names or shapes of the layers".into()),
    }
}

/// The largest difference, relative to the largest value of its tensor; `None` if names or shapes differ.
fn same_values(a: &StateDict, b: &StateDict) -> Result<Option<f64>> {
    if !a.keys().eq(b.keys()) {
        return Ok(None);
    }
    let mut apart = 0f64;
    for (a, b) in a.values().zip(b.values()) {
        if a.dims() != b.dims() {
            return Ok(None);
        }
        let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
        let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
        apart = apart.max(largest(&(&a - &b)?)? / largest(&a)?.max(f64::MIN_POSITIVE));
    }
    Ok(Some(apart))
}

/// ΔW of each layer, and all other tensors: what a base of zeros becomes.
fn updates((config, tensors): &Adapter) -> Result<StateDict> {
    let (mut base, mut explicit) = (StateDict::new(), config.clone());
    explicit.layers.clear();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F64, &Device::Cpu);
    for (name, tensor) in tensors {
        let (path, last) = name.rsplit_once('.').unwrap_or(("", name));
        match last {
            "lora_A" => {
                let b = tensors.get(&format!("{path}.lora_B")).ok_or("a lora_B is missing")?;
                let kind = config.kind(path).unwrap_or(&LayerKind::Linear);
                let LoraConfig { r, lora_alpha, fan_in_fan_out, .. } = config.lora_config(path);
                let layer = LayerConfig {
                    kind: Some(kind.clone()),
                    r: Some(r),
                    lora_alpha: Some(lora_alpha),
                    fan_in_fan_out: Some(fan_in_fan_out),
                };
                explicit.layers.insert(path.to_owned(), layer);
                let (name, mut shape) = weight(path, kind, [tensor, b], r)?;
                if fan_in_fan_out {
                    shape.reverse();
                }
                base.insert(name, zeros(&shape)?);
            }
            "lora_B" | "lora_magnitude_vector" => {}
            "lora_bias" => drop(base.insert(format!("{path}.bias"), zeros(tensor.dims())?)),
            // After lora_A, which has the size of the whole table.
            "trainable_tokens" => {
                let rows = config.trainable_token_indices.get(path).into_iter().flatten();
                let count = rows.max().map_or(0, |row| row + 1);
                let table = zeros(&[count, tensor.dim(1)?])?;
                base.entry(format!("{path}.weight")).or_insert(table);
            }
            _ => drop(base.insert(name.clone(), tensor.clone())),
        }
    }
    Ok(lora::merge_into(&base, tensors, explicit)?)
}

/// The name of the tensor that factors of rank `r` change, and its shape.
fn weight(
    path: &str,
    kind: &LayerKind,
    [a, b]: [&Tensor; 2],
    r: usize,
) -> Result<(String, Vec<usize>)> {
    if let LayerKind::Parameter { .. } = kind {
        return Ok((path.to_owned(), vec![a.dim(0)?, b.dim(1)?, a.dim(2)?]));
    }
    let ((rows, columns), (outs, _)) = (a.dims2()?, b.dims2()?);
    let conv = |n: u32, groups: usize| {
        let k = rows / r.max(1);
        let (out, inputs) = (outs / k.pow(n / 2) * groups, columns / k.pow(n.div_ceil(2)) / groups);
        [&[out, inputs][..], &[k; 3][..n as usize]].concat()
    };
    let shape = match kind {
        LayerKind::Embedding => vec![columns, outs],
        LayerKind::Conv1d { groups } => conv(1, *groups),
        LayerKind::Conv2d { groups } => conv(2, *groups),
        LayerKind::Conv3d { groups } => conv(3, *groups),
        LayerKind::MergedLinear(enabled) => {
            let count = enabled.iter().filter(|on| **on).count().max(1);
            vec![outs / count * enabled.len(), columns]
        }
        LayerKind::MergedSplits(splits) => vec![splits.iter().map(|split| split.0).sum(), columns],
        _ => vec![outs, columns],
    };
    Ok((format!("{path}.weight"), shape))
}
