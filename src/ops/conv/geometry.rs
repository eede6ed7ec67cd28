//! The sizes of a convolution, and where its kernel meets the input.

use crate::ops::checked_size::checked_product;
use candle_core::{bail, Result, Tensor};

/// The options of a convolution in three spatial dimensions. With fewer, the leading ones have a kernel
/// of 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub groups: usize,
    pub kernel: [usize; 3],
    pub padding: [usize; 3],
    pub stride: [usize; 3],
    pub dilation: [usize; 3],
}

/// A [`Geometry`] with the shapes of the input and the output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub geometry: Geometry,
    pub batch: usize,
    pub c_in: usize,
    pub c_out: usize,
    pub input: [usize; 3],
    pub output: [usize; 3],
}

impl Sizes {
    pub fn new(geometry: Geometry, x: &Tensor, w: &Tensor) -> Result<Self> {
        let (g, n) = (geometry.groups, w.rank().saturating_sub(2));
        if g == 0 || geometry.stride.contains(&0) || geometry.dilation.contains(&0) {
            bail!("conv{n}d: groups, strides and dilations are at least 1: {geometry:?}")
        }
        if !(1..=3).contains(&n)
            || w.dims()[2..] != geometry.kernel[3 - n..]
            || w.dims().contains(&0)
        {
            bail!(
                "a convolution with kernels of {:?} has the weight {:?}, expected (out, in/groups, k..)",
                geometry.kernel,
                w.dims()
            )
        }
        let (c_out, per_group) = (w.dim(0)?, w.dim(1)?);
        if x.rank() != n + 2 || x.dim(1)? != per_group * g {
            bail!(
                "conv{n}d: the input is {:?}, expected (batch, {}, {n} spatial dimensions) for the \
                 weight {:?} with {g} groups",
                x.dims(),
                per_group * g,
                w.dims()
            )
        }
        if x.dtype() != w.dtype() {
            bail!("conv{n}d: the input is {:?} and the weight {:?}", x.dtype(), w.dtype())
        }
        let mut input = [1; 3];
        input[3 - n..].copy_from_slice(&x.dims()[2..]);
        let mut output = [1; 3];
        for i in 0..3 {
            let reach = geometry.dilation[i]
                .checked_mul(geometry.kernel[i] - 1)
                .and_then(|reach| reach.checked_add(1));
            let padded = geometry.padding[i]
                .checked_mul(2)
                .and_then(|padding| padding.checked_add(input[i]));
            let (Some(reach), Some(padded)) = (reach, padded) else {
                bail!("conv{n}d: {geometry:?} is too large")
            };
            if padded < reach {
                bail!(
                    "conv{n}d: the kernel reaches over {reach} values, the padded input {:?} has \
                     {padded}",
                    x.dims()
                )
            }
            output[i] = (padded - reach) / geometry.stride[i] + 1;
        }
        // The columns' bytes must not overflow.
        let kernel = geometry.kernel.into_iter();
        checked_product(&kernel.chain(output).chain([per_group, g, c_out, 8]).collect::<Vec<_>>())?;
        Ok(Self { geometry, batch: x.dim(0)?, c_in: per_group * g, c_out, input, output })
    }

    /// Output positions.
    pub fn positions(&self) -> usize {
        self.output.iter().product()
    }

    /// Rows of one group's columns: in/g times the kernel's size.
    pub fn column_rows(&self) -> usize {
        self.c_in / self.geometry.groups * self.geometry.kernel.iter().product::<usize>()
    }

    /// Values of one channel of one sample.
    pub fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    /// The input index that kernel offset `k` meets along dimension `d` at output position `out`, or
    /// `None` in the padding.
    pub fn input_index(&self, d: usize, k: usize, out: usize) -> Option<usize> {
        let g = &self.geometry;
        let at = (out * g.stride[d] + k * g.dilation[d]).checked_sub(g.padding[d])?;
        (at < self.input[d]).then_some(at)
    }

    pub fn output_dims(&self, n: usize) -> Vec<usize> {
        [&[self.batch, self.c_out], &self.output[3 - n..]].concat()
    }
}

/// All (i, j, k) below the given bounds, the last index fastest.
pub(super) fn index3(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| (i, j, k))))
}
