//! Convolution in 1, 2 and 3 dimensions with a low-rank update of the kernel, and gradients that are
//! right for every padding, stride, dilation and number of groups.
//!
//! candle's conv1d ignores the strides of a non-contiguous kernel in its backward, its conv2d fails on
//! non-square inputs with a stride remainder, and it has no conv3d. Here a convolution is
//! `kernel (out, in/g·k) · columns (in/g·k, positions)`.

mod cpu;
mod device;
mod geometry;
mod unfold;

use crate::ops::cpu::on_cpu;
use crate::ops::custom_gradient::{leaf, upstream};
use crate::ops::dora::scaled_weight;
use crate::ops::elementwise::add;
use crate::ops::lora::LowRank;
use crate::ops::op::{compute_dtype, if_tracked, operand, run, Fused, Grads, Operand};
use candle_core::{CpuStorage, DType, Result, Shape, Tensor};
use cpu::Compute;
use geometry::Sizes;

pub(crate) use geometry::Geometry;

/// `conv(x, W) + conv(x̃, ΔW)` with `ΔW = (s·B·A)` reshaped to the kernel and x̃ = dropout(x): `x` (batch,
/// in, spatial..) with `w` (out, in/g, k..) to (batch, out, spatial..). With DoRA
/// `conv(x − x̃, W) + conv(x̃, c ∘ (W + ΔW))`, as in PEFT.
///
/// Each operand gets a gradient only if it leads to a variable.
pub(crate) fn conv(
    x: &Tensor,
    w: &Tensor,
    update: Option<&LowRank>,
    geometry: Geometry,
) -> Result<Tensor> {
    let Some(update) = update else { return base_conv(x, w, geometry) };
    let delta = update.delta(w.dtype())?.reshape(w.shape())?;
    // The kernel is small beside the activations: adding ΔW to it costs less than a second convolution.
    let effective = || {
        let w = add(&delta, &w.to_dtype(delta.dtype())?)?;
        match update.magnitude() {
            None => Ok(w),
            Some(magnitude) => scaled_weight(&w, magnitude, 0),
        }
    };
    // In the compute dtype: rounded to half precision, W + ΔW would lose most of a small update.
    let conv = |x: &Tensor, w: &Tensor| {
        let y = base_conv(&x.to_dtype(delta.dtype())?, &w.to_dtype(delta.dtype())?, geometry)?;
        y.to_dtype(x.dtype())
    };
    match (update.dropout().mask(x)?, update.magnitude()) {
        (None, _) => conv(x, &effective()?),
        (Some(mask), None) => add(&conv(x, w)?, &conv(&mask.apply(x)?, &delta)?),
        (Some(mask), Some(_)) => {
            let (kept, rest) = mask.split(x)?;
            add(&conv(&rest, w)?, &conv(&kept, &effective()?)?)
        }
    }
}

/// The convolution itself.
fn base_conv(x: &Tensor, w: &Tensor, geometry: Geometry) -> Result<Tensor> {
    let sizes = Sizes::new(geometry, x, w)?;
    run(ConvOp(sizes), [x, w])?.reshape(sizes.output_dims(w.rank() - 2))
}

/// `x` and `w` to (batch, out, positions).
struct ConvOp(Sizes);

impl Fused<2> for ConvOp {
    const NAME: &'static str = "convolution";

    fn fused_dtype(&self, [x, _]: [&Tensor; 2]) -> Option<DType> {
        let dtype = x.dtype();
        matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
            .then(|| compute_dtype(dtype))
    }

    fn forward(&self, xw: [Operand; 2]) -> Result<(CpuStorage, Shape)> {
        Compute::Output.run(&self.0, xw)
    }

    fn backward(&self, [x, w]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<Grads<2>> {
        let to = |x: &Tensor, from: &Tensor, compute: Compute| {
            let from = || operand(from, grad.dtype());
            let gx = || on_cpu([grad, &from()?], |operands| compute.run(&self.0, operands));
            if_tracked(x, || gx()?.reshape(x.shape()))
        };
        Ok([to(x, w, Compute::Input)?, to(w, x, Compute::Kernel)?])
    }

    fn composed(&self, [x, w]: [&Tensor; 2]) -> Result<Tensor> {
        device::conv(x, w, &self.0)
    }

    /// The columns are gathered again: they are kⁿ times the input.
    fn composed_backward(&self, xw: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<Grads<2>> {
        let [x, w] = xw.map(leaf);
        let (x, w) = (x?, w?);
        let y = device::conv(&x, &w, &self.0)?;
        let mut grads = upstream(&y, grad.clone())?.backward()?;
        Ok([grads.remove(&x), grads.remove(&w)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Error, Var};

    /// Outputs and gradients, with one sample and with several for each thread.
    #[test]
    fn the_cpu_and_the_device_implementations_agree() -> Result<()> {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.map_err(Error::wrap)?.install(they_agree)?;
        }
        Ok(())
    }

    fn they_agree() -> Result<()> {
        for n in 1..=3usize {
            for groups in [1, 2] {
                for (padding, stride, dilation, k) in [
                    (0, 1, 1, 3),
                    (1, 2, 1, 3),
                    (2, 3, 2, 2),
                    (0, 2, 1, 1),
                    (3, 1, 3, 3),
                    (4, 2, 4, 2),
                ] {
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
                    let x = Var::from_tensor(&crate::random::normal(x_dims)?)?;
                    let w = Var::from_tensor(&crate::random::normal(w_dims)?)?;
                    let y1 = base_conv(&x, &w, g)?;
                    let y2 = device::conv(&x, &w, &Sizes::new(g, &x, &w)?)?.reshape(y1.shape())?;
                    let probe = crate::random::normal(y1.shape())?.to_dtype(y1.dtype())?;
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
                        for y in [base_conv(&x, &w, g)?, device::conv(&x, &w, &sizes)?] {
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
