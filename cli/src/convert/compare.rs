//! Compares an adapter with what was read of its conversion.

use crate::Result;
use candle_core::{DType, Device, Tensor};
use lora::adapter::LayerWeights;
use lora::layers::LayerKind;
use lora::{merge, utils::StateDict, LoraWeights};
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

pub fn compare(before: &LoraWeights, after: &LoraWeights) -> Result<Verdict> {
    let (a, b) = (before.state_dict(), after.state_dict());
    if same_values(&a, &b)? == Some(0.) && same_scalings(before, after) {
        return Ok(match a.values().map(Tensor::dtype).eq(b.values().map(Tensor::dtype)) {
            true => Verdict::Equal,
            false => Verdict::OtherDtype,
        });
    }
    match same_values(&updates(before)?, &updates(after)?)? {
        Some(0.) => Ok(Verdict::SameUpdate),
        Some(apart) if apart <= MOST => Ok(Verdict::Rounded(apart)),
        Some(apart) => Err(format!("the conversion changes the update by {apart:.1e}").into()),
        None => Err("the conversion changes the names or shapes of the layers".into()),
    }
}

/// Whether the layers, which both have, are scaled alike.
fn same_scalings(before: &LoraWeights, after: &LoraWeights) -> bool {
    before.layers().all(|(path, _)| {
        let scaling = |weights: &LoraWeights| Some(weights.lora_config(path)?.scaling());
        let (Some(a), Some(b)) = (scaling(before), scaling(after)) else { return false };
        (a - b).abs() <= 4. * f64::EPSILON * a.abs()
    })
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
fn updates(weights: &LoraWeights) -> Result<StateDict> {
    let (mut base, mut explicit, tensors) =
        (StateDict::new(), weights.config(), weights.state_dict());
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F64, &Device::Cpu);
    for (path, layer) in weights.layers() {
        let transposed = weights.lora_config(path).is_some_and(|cfg| cfg.fan_in_fan_out);
        let kind = layer.kind.clone().unwrap_or(LayerKind::Linear);
        let (name, mut shape) = weight(path, &kind, layer)?;
        if transposed {
            shape.reverse();
        }
        base.insert(name, zeros(&shape)?);
        if let Some(bias) = &layer.bias {
            base.insert(format!("{path}.bias"), zeros(bias.dims())?);
        }
        // Zeros do not tell how they are stored.
        let own = explicit.layers.entry(path.to_owned()).or_default();
        (own.kind, own.fan_in_fan_out) = (Some(kind), Some(transposed));
    }
    for (path, indices) in &explicit.trainable_token_indices {
        let rows = tensors.get(&format!("{path}.trainable_tokens")).ok_or("rows are missing")?;
        let count = indices.iter().max().map_or(0, |row| row + 1);
        // An adapted table has the size of its lora_A.
        let table = zeros(&[count, rows.dim(1)?])?;
        base.entry(format!("{path}.weight")).or_insert(table);
    }
    let others = tensors.iter().filter(|(name, _)| {
        let last = name.rsplit('.').next().unwrap_or_default();
        !last.starts_with("lora_") && last != "trainable_tokens"
    });
    base.extend(others.map(|(name, tensor)| (name.clone(), tensor.clone())));
    Ok(merge::merge_into(&base, &LoraWeights::new(explicit, tensors.clone())?)?)
}

/// The name of the tensor that a layer's factors change, and its shape.
fn weight(path: &str, kind: &LayerKind, layer: &LayerWeights) -> Result<(String, Vec<usize>)> {
    let LayerWeights { a, b, r, .. } = layer;
    if let LayerKind::Parameter { .. } = kind {
        return Ok((path.to_owned(), vec![a.dim(0)?, b.dim(1)?, a.dim(2)?]));
    }
    let ((rows, columns), (outs, _)) = (a.dims2()?, b.dims2()?);
    let conv = |n: u32, groups: usize| {
        let k = rows / (*r).max(1);
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
