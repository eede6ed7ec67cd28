//! The tensors of a file, grouped by layer.

use super::layers::Layer;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// What a tensor is in its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
    Alpha,
}

#[derive(Default)]
struct Pair {
    a: Option<(String, Tensor)>,
    b: Option<(String, Tensor)>,
    alpha: Option<(String, Tensor)>,
}

/// The tensors by path of their layer, with their keys in the file.
#[derive(Default)]
pub(super) struct Pairs(BTreeMap<String, Pair>);

impl Pairs {
    pub fn insert(&mut self, path: String, part: Part, key: String, tensor: Tensor) -> Result<()> {
        let pair = self.0.entry(path).or_default();
        let place = match part {
            Part::A => &mut pair.a,
            Part::B => &mut pair.b,
            Part::Alpha => &mut pair.alpha,
        };
        if let Some((other, _)) = place {
            return Err(Error::tensor(key, format!("it is the same tensor as {other:?}")));
        }
        *place = Some((key, tensor));
        Ok(())
    }

    /// The layers in the order of their paths. An error if one lacks a factor.
    pub fn into_layers(self) -> Result<Vec<Layer>> {
        if self.0.is_empty() {
            return Err(Error::Invalid("it has no factors of LoRA".to_owned()));
        }
        self.0.into_iter().map(|(path, pair)| layer(path, pair)).collect()
    }
}

fn layer(path: String, Pair { a, b, alpha }: Pair) -> Result<Layer> {
    let key = [&a, &b, &alpha].into_iter().flatten().map(|(key, _)| key.clone()).next();
    let (Some((key, a)), Some((b_key, b))) = (a, b) else {
        let reason = "its layer lacks one of the two factors";
        return Err(Error::tensor(key.unwrap_or(path), reason));
    };
    for (key, factor) in [(&key, &a), (&b_key, &b)] {
        if !factor.dtype().is_float() {
            return Err(Error::tensor(key, format!("it holds {:?}", factor.dtype())));
        }
    }
    let scalar = |(key, alpha)| scalar(&alpha).map_err(|e| Error::tensor(key, e));
    let alpha = alpha.map(scalar).transpose()?;
    Ok(Layer { path, key, a, b, alpha, embedding: false })
}

/// The value of a tensor with one, in any dtype.
fn scalar(t: &Tensor) -> candle_core::Result<f64> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.reshape(())?.to_scalar()
}
