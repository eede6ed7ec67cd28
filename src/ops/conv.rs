//! Convolution in 1, 2 and 3 dimensions with gradients that are right for every padding, stride,
//! dilation and number of groups.
//!
//! candle's own conv1d ignores the strides of a non-contiguous kernel in its backward, its conv2d
//! fails on non-square inputs with a stride remainder, and it has no conv3d. Here a convolution is
//! `kernel (out, in/g·k) · columns (in/g·k, positions)`: by a kernel of its own on the CPU, and
//! composed of candle's operations on other devices.

use super::convolve::Convolve;
use super::gather::gather;
use super::linear;
use crate::layers::checked;
use candle_core::{bail, DType, Device, Result, Tensor};

/// The sizes of a convolution, in three spatial dimensions; the leading ones are 1 where there are
/// fewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub groups: usize,
    pub kernel: [usize; 3],
    pub padding: [usize; 3],
    pub stride: [usize; 3],
    pub dilation: [usize; 3],
}

/// A [`Geometry`] and the shapes of the tensors at hand.
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
    fn new(geometry: Geometry, x: &Tensor, w: &Tensor) -> Result<Self> {
        let n = w.rank() - 2;
        let g = geometry.groups;
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
        // The columns, in bytes, must be a number.
        let kernel = geometry.kernel.into_iter();
        checked(&kernel.chain(output).chain([per_group, g, c_out, 8]).collect::<Vec<_>>())?;
        Ok(Self { geometry, batch: x.dim(0)?, c_in: per_group * g, c_out, input, output })
    }

    /// Output positions.
    pub fn positions(&self) -> usize {
        self.output.iter().product()
    }

    /// Rows of one group's columns: in/g · k.
    pub fn reach(&self) -> usize {
        self.c_in / self.geometry.groups * self.geometry.kernel.iter().product::<usize>()
    }

    /// Values of one sample's channel.
    pub fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    /// Where kernel offset `k` meets the input along dimension `d`, for each output position.
    /// `None` in the padding.
    pub fn meets(&self, d: usize, k: usize, out: usize) -> Option<usize> {
        let g = &self.geometry;
        let at = (out * g.stride[d] + k * g.dilation[d]).checked_sub(g.padding[d])?;
        (at < self.input[d]).then_some(at)
    }

    fn output_dims(&self, n: usize) -> Vec<usize> {
        [&[self.batch, self.c_out], &self.output[3 - n..]].concat()
    }
}

/// `x` (batch, in, spatial..) with `w` (out, in/g, k..) to (batch, out, spatial..). Each operand
/// gets a gradient only where a variable lies behind it. Half precision is widened on the CPU.
pub(crate) fn conv(x: &Tensor, w: &Tensor, geometry: Geometry) -> Result<Tensor> {
    let sizes = Sizes::new(geometry, x, w)?;
    let dtype = x.dtype();
    let y = match (x.device(), dtype) {
        (Device::Cpu, DType::F16 | DType::BF16) => {
            Convolve::apply(&x.to_dtype(DType::F32)?, &w.to_dtype(DType::F32)?, sizes)?
                .to_dtype(dtype)?
        }
        (Device::Cpu, _) => Convolve::apply(x, w, sizes)?,
        _ => composed(x, w, &sizes)?,
    };
    y.reshape(sizes.output_dims(w.rank() - 2))
}

/// The same of candle's operations: a product with the input's columns.
fn composed(x: &Tensor, w: &Tensor, s: &Sizes) -> Result<Tensor> {
    let (groups, n) = (s.geometry.groups, s.positions());
    if x.elem_count() == 0 {
        // Devices refuse to gather nothing.
        return Tensor::zeros((s.batch, s.c_out, n), x.dtype(), x.device());
    }
    // From (batch, in, positions·k) to (batch, groups, positions, in/g·k), the rows of a linear
    // layer's input.
    let columns = gather(x, s)?
        .reshape((s.batch, groups, s.c_in / groups, n, ()))?
        .transpose(2, 3)?
        .reshape((s.batch, groups, n, s.reach()))?;
    let w = w.reshape((groups, s.c_out / groups, s.reach()))?;
    let parts = (0..groups).map(|g| {
        let part = linear(&columns.narrow(1, g, 1)?.squeeze(1)?, &w.get(g)?.t()?, None, None)?;
        part.transpose(1, 2)
    });
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)
}

pub(super) fn product3(
    a: usize,
    b: usize,
    c: usize,
) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| (i, j, k))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Error, Var};

    /// The CPU's kernel and the composition that other devices use, outputs and gradients, with shares
    /// of one sample and of several.
    #[test]
    fn the_kernel_and_the_composition_agree() -> Result<()> {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.map_err(Error::wrap)?.install(they_agree)?;
        }
        Ok(())
    }

    fn they_agree() -> Result<()> {
        for n in 1..=3usize {
            for groups in [1, 2] {
                for (padding, stride, dilation, k) in
                    [(0, 1, 1, 3), (1, 2, 1, 3), (2, 3, 2, 2), (0, 2, 1, 1)]
                {
                    let mut g = Geometry {
                        groups,
                        kernel: [1; 3],
                        padding: [0; 3],
                        stride: [1; 3],
                        dilation: [1; 3],
                    };
                    for d in 3 - n..3 {
                        (g.kernel[d], g.padding[d]) = (k, padding);
                        (g.stride[d], g.dilation[d]) = (stride, dilation);
                    }
                    let x_dims = [&[4, 4][..], &[7, 8, 6][3 - n..]].concat();
                    let w_dims = [&[6, 4 / groups][..], &vec![k; n]].concat();
                    let x = Var::randn(0f64, 1., x_dims, &Device::Cpu)?;
                    let w = Var::randn(0f64, 1., w_dims, &Device::Cpu)?;
                    let y1 = conv(&x, &w, g)?;
                    let y2 = composed(&x, &w, &Sizes::new(g, &x, &w)?)?.reshape(y1.shape())?;
                    let probe = y1.randn_like(0., 1.)?.detach();
                    let g1 = (&y1 * &probe)?.sum_all()?.backward()?;
                    let g2 = (&y2 * &probe)?.sum_all()?.backward()?;
                    for (a, b) in [
                        (&y1, &y2),
                        (g1.get(&x).unwrap(), g2.get(&x).unwrap()),
                        (g1.get(&w).unwrap(), g2.get(&w).unwrap()),
                    ] {
                        let d = (a - b)?.abs()?.max_all()?.to_scalar::<f64>()?;
                        assert!(d < 1e-10, "{n}d {g:?}: {d}");
                    }
                    for (x, w) in
                        [(x.detach(), w.as_tensor().clone()), (x.into_inner(), w.detach())]
                    {
                        let sizes = Sizes::new(g, &x, &w)?;
                        for y in [conv(&x, &w, g)?, composed(&x, &w, &sizes)?] {
                            let grads = y.sum_all()?.backward()?;
                            assert_eq!(grads.get_ids().count(), 1, "{n}d {g:?}: of the variable");
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
