//! A layer's update as products of matrices.

use super::conv;
use super::layer::{Factors, LayerWeights};
use super::pair::Pair;
use crate::layers::{LayerKind, Total};
use crate::ops::Svd;
use candle_core::{bail, DType, Device, Result, Tensor};

/// `B·A` of a layer, in F64 on the CPU and without its scaling: one product, or for a merged linear layer one for each of
/// the splits that are adapted. A convolution has PEFT's factors, its kernels in a row.
pub(super) struct Products {
    /// A (r, in) and B (out, r), with the same r.
    pub products: Vec<[Tensor; 2]>,
    /// Of A in a convolution (in, k..).
    kernel: Option<Vec<usize>>,
}

impl Products {
    pub fn of(layer: &LayerWeights) -> Result<Self> {
        if layer.is_parameter() {
            bail!("it is of a parameter, which is no layer's weight")
        }
        let exact = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.contiguous();
        let (a, b) = (exact(&layer.a)?, exact(&layer.b)?);
        if let Some((n, groups)) = layer.kind.as_ref().and_then(LayerKind::spatial) {
            if groups > 1 {
                bail!("it is of a convolution with {groups} groups: their ranks can only be concatenated")
            }
            let pair = conv::to_peft(n, 1, &Pair { a, b, r: layer.r }, layer.conv_rank)?;
            let Some(Pair { a, b, r }) = pair else {
                let (a, b) = (layer.a.dims(), layer.b.dims());
                bail!("lora_A {a:?} and lora_B {b:?} are not those of a {:?}", layer.kind)
            };
            let (kernel, out) = (a.dims()[1..].to_vec(), b.dim(0)?);
            let products = vec![[a.reshape((r, ()))?, b.reshape((out, r))?]];
            return Ok(Self { products, kernel: Some(kernel) });
        }
        let ((rows, _), (outs, r)) = (a.dims2()?, b.dims2()?);
        let splits = match layer.kind.as_ref().and_then(|kind| kind.splits(Total::Enabled(outs))) {
            Some(splits) => {
                splits.into_iter().filter(|(_, on)| *on).map(|(size, _)| size).collect()
            }
            None => vec![outs],
        };
        if rows != r * splits.len() {
            let (a, b) = (layer.a.dims(), layer.b.dims());
            bail!("lora_A is {a:?} and lora_B {b:?}: the kind of the layer is not known")
        }
        let (mut products, mut from) = (vec![], 0);
        for (i, size) in splits.into_iter().enumerate() {
            products.push([a.narrow(0, i * r, r)?, b.narrow(0, from, size)?]);
            from += size;
        }
        Ok(Self { products, kernel: None })
    }

    /// These with others in place of the factors.
    pub fn with(&self, products: Vec<[Tensor; 2]>) -> Self {
        Self { products, kernel: self.kernel.clone() }
    }

    /// The layer of these products with this scaling, of the kind and dtype of `like`, but F32 for half precision.
    pub fn into_layer(
        self,
        like: &LayerWeights,
        scaling: f64,
        rslora: bool,
    ) -> Result<LayerWeights> {
        let dtype = match like.a.dtype() {
            DType::F16 | DType::BF16 => DType::F32,
            dtype => dtype,
        };
        let cat = |i: usize| {
            let parts: Vec<_> = self.products.iter().map(|product| &product[i]).collect();
            Tensor::cat(&parts, 0)?.to_dtype(dtype)?.to_device(like.a.device())
        };
        let (a, b) = (cat(0)?, cat(1)?);
        let (out, r) = b.dims2()?;
        let Some(kernel) = &self.kernel else {
            let fan_in_fan_out = like.fan_in_fan_out;
            let layer =
                LayerWeights::new(like.kind.clone(), Factors::scaled([a, b], r, scaling, rslora));
            return Ok(LayerWeights { fan_in_fan_out, ..layer });
        };
        let a = a.reshape([&[r][..], kernel].concat())?;
        let b = b.reshape([&[out, r][..], &vec![1; kernel.len() - 1]].concat())?;
        of_kernels(like.kind.clone(), [a, b], scaling, rslora)
    }
}

/// The layer of a convolution from PEFT's factors.
pub(super) fn of_kernels(
    kind: Option<LayerKind>,
    [a, b]: [Tensor; 2],
    scaling: f64,
    rslora: bool,
) -> Result<LayerWeights> {
    let (n, own) = (a.rank() - 2, b.dim(1)?);
    let pair = conv::from_peft(1, a, b)?;
    let conv_rank = conv::rank_in_peft(n, 1, &pair, own);
    let Pair { a, b, r } = pair;
    let layer = LayerWeights::new(kind, Factors::scaled([a, b], r, scaling, rslora));
    Ok(LayerWeights { conv_rank, ..layer })
}

/// A product of a chosen rank, and how much of another it is.
pub(super) struct Nearest {
    pub product: [Tensor; 2],
    /// The squared norms of what is kept and of all.
    pub kept: f64,
    pub all: f64,
}

impl Nearest {
    /// Of `u·diag(s)·vᵀ`. Ranks that it does not have are 0.
    pub fn of(Svd { u, s, v }: &Svd, rank: usize) -> Result<Self> {
        let own = rank.min(s.dim(0)?);
        let b = u.narrow(1, 0, own)?.broadcast_mul(&s.narrow(0, 0, own)?)?;
        let a = v.narrow(1, 0, own)?.t()?.contiguous()?;
        let squares = s.sqr()?.to_vec1::<f64>()?;
        let product = [a.pad_with_zeros(0, 0, rank - own)?, b.pad_with_zeros(1, 0, rank - own)?];
        Ok(Self { product, kept: squares[..own].iter().sum(), all: squares.iter().sum() })
    }
}
