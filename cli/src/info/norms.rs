//! The norms of an adapter's updates.

use crate::Result;
use candle_core::{DType, Tensor};
use loralib::adapter::LayerWeights;
use loralib::layers::LayerKind;
use loralib::LoraWeights;
use std::collections::BTreeMap;

/// ‖ΔW‖ of each block of layers, in the order of their numbers: of those with the same path up to its last number.
pub fn norms(weights: &LoraWeights) -> Result<Vec<(String, f64)>> {
    let mut squares = BTreeMap::<(String, usize, String), f64>::new();
    for (path, layer) in weights.layers() {
        let scaling = weights.lora_config(path).map_or(1., |config| config.scaling());
        let square = scaling.powi(2) * square(layer).map_err(|e| format!("{path}: {e}"))?;
        *squares.entry(block(path)).or_default() += square;
    }
    Ok(squares.into_iter().map(|((.., name), square)| (name, square.max(0.).sqrt())).collect())
}

/// A key to sort by, and the block's name: `model.layers.3` of `model.layers.3.self_attn.q_proj`.
fn block(path: &str) -> (String, usize, String) {
    let parts: Vec<_> = path.split('.').collect();
    let number = |part: &&str| part.parse::<usize>().ok();
    match parts.iter().rposition(|part| number(part).is_some()) {
        Some(at) => {
            let n = number(&parts[at]).unwrap_or_default();
            (parts[..at].join("."), n, parts[..=at].join("."))
        }
        None => (path.to_owned(), 0, path.to_owned()),
    }
}

/// ‖B·A‖² without B·A: the sum of the products of BᵀB and AAᵀ.
fn square(layer: &LayerWeights) -> candle_core::Result<f64> {
    let wide = |t: &Tensor| t.to_dtype(DType::F64);
    let (mut a, mut b) = (wide(&layer.a)?, wide(&layer.b)?);
    if let Some([a0, b0]) = &layer.initial {
        a = Tensor::cat(&[&a, &wide(a0)?], 0)?;
        b = Tensor::cat(&[&b, &wide(b0)?.neg()?], 1)?;
    }
    let of = |a: &Tensor, b: &Tensor| {
        let (left, right) = (b.t()?.contiguous()?.matmul(b)?, a.matmul(&a.t()?)?);
        (left * right)?.sum_all()?.to_scalar::<f64>()
    };
    let Ok((rows, _)) = a.dims2() else { return of(&a, &b) };
    let rank = b.dim(1)?;
    if rows == rank {
        return of(&a, &b);
    }
    // Some splits of a fused layer, each with its rows of A and of B.
    let n = rows / rank.max(1);
    let sizes = match &layer.kind {
        Some(LayerKind::MergedSplits(splits)) => {
            splits.iter().filter(|(_, on)| *on).map(|(size, _)| *size).collect()
        }
        _ => vec![b.dim(0)? / n.max(1); n],
    };
    let (mut sum, mut from) = (0., 0);
    for (i, size) in sizes.into_iter().enumerate() {
        sum += of(&a.narrow(0, i * rank, rank)?, &b.narrow(0, from, size)?)?;
        from += size;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use loralib::adapter::AdapterConfig;
    use loralib::{utils::StateDict, LoraConfig};

    #[test]
    fn a_norm_is_that_of_the_product() -> Result<()> {
        let values = |rows: usize, columns: usize, seed: f64| {
            let n = (rows * columns) as f64;
            let values = (Tensor::arange(0., n, &Device::Cpu)? * seed)?.sin()?;
            values.reshape((rows, columns))
        };
        let (a, b) = (values(2, 5, 0.7)?, values(4, 2, 1.3)?);
        let (a3, b3) = (values(4, 5, 0.9)?, values(6, 2, 1.1)?);
        let tensors: StateDict = [
            ("h.10.fc.lora_A", a.clone()),
            ("h.10.fc.lora_B", b.clone()),
            ("h.10.qkv.lora_A", a3.clone()),
            ("h.10.qkv.lora_B", b3.clone()),
            ("h.9.fc.lora_A", a.clone()),
            ("h.9.fc.lora_B", (&b * 2.)?),
        ]
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .into();
        let config: AdapterConfig =
            LoraConfig { r: 2, lora_alpha: 6., ..Default::default() }.into();
        let config =
            config.with_layer("h.10.qkv", LayerKind::MergedLinear(vec![true, false, true]));
        let norms = norms(&LoraWeights::new(config, tensors)?)?;
        let norm = |products: &[Tensor]| -> Result<f64> {
            let squares = products.iter().map(|p| p.sqr()?.sum_all()?.to_scalar::<f64>());
            Ok(3. * squares.sum::<candle_core::Result<f64>>()?.sqrt())
        };
        let part = |t: &Tensor, i: usize, n: usize| t.narrow(0, i * n, n);
        let splits = [0, 1].map(|i| part(&b3, i, 3)?.matmul(&part(&a3, i, 2)?));
        let [first, second] = splits;
        let expected = [
            ("h.9", 2. * norm(&[b.matmul(&a)?])?),
            ("h.10", norm(&[b.matmul(&a)?, first?, second?])?),
        ];
        assert_eq!(norms.len(), 2);
        for ((name, norm), (expected_name, expected)) in norms.iter().zip(expected) {
            assert!(
                name == expected_name && (norm - expected).abs() < 1e-9,
                "{name}: {norm}, {expected}"
            );
        }
        Ok(())
    }
}
