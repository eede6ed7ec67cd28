//! Convolution on devices, composed of candle's operations: columns are gathered and multiplied. The
//! backward gathers too, because devices execute `index_add` one index after another.

use super::geometry::{index3, Sizes};
use crate::ops::backend::Backend;
use crate::ops::custom_gradient::with_zero_grads;
use crate::ops::linear::linear;
use crate::ops::matrix::Matrix;
use crate::ops::op::{Custom, Grads, Op};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// The index that candle's `index_select` reads as zero.
const PADDING: u32 = u32::MAX;

/// `x` and `w` to (batch, out, positions).
pub(super) fn conv(x: &Tensor, w: &Tensor, s: &Sizes) -> Result<Tensor> {
    let (groups, n) = (s.geometry.groups, s.positions());
    if x.elem_count() == 0 {
        // Devices refuse empty gathers.
        let y = Tensor::zeros((s.batch, s.c_out, n), x.dtype(), x.device())?;
        return with_zero_grads(y, [x, w]);
    }
    // From (batch, in, positions·k) to (batch, groups, positions, in/g·k), the rows of a linear
    // layer's input.
    let columns = gather(x, s)?
        .reshape((s.batch, groups, s.c_in / groups, n, ()))?
        .transpose(2, 3)?
        .reshape((s.batch, groups, n, s.column_rows()))?;
    let w = w.reshape((groups, s.c_out / groups, s.column_rows()))?;
    let outputs = (0..groups).map(|g| {
        let y = linear(
            &columns.narrow(1, g, 1)?.squeeze(1)?,
            &Matrix::Dense(w.get(g)?.t()?),
            None,
            None,
        )?;
        y.transpose(1, 2)
    });
    Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 1)
}

/// `x` (batch, in, spatial..) to its columns (batch, in, positions·k).
fn gather(x: &Tensor, s: &Sizes) -> Result<Tensor> {
    let x = x.reshape((s.batch, s.c_in, s.input_len()))?.contiguous()?;
    let from = sources(s)?;
    let ids = Tensor::new(from.as_slice(), x.device())?;
    x.apply_op1(Custom(GatherOp { ids, from, k: s.geometry.kernel.iter().product() }))
}

/// The input value of each position and kernel offset.
fn sources(s: &Sizes) -> Result<Vec<u32>> {
    let [k0, k1, k2] = s.geometry.kernel;
    let [o0, o1, o2] = s.output;
    let k = k0 * k1 * k2;
    // The devices' kernels count values in 32 bits, and do not terminate beyond that.
    let values = |n: usize| [s.batch, s.c_in, k].into_iter().fold(n, usize::saturating_mul);
    if values(s.positions().max(s.input_len())) >= PADDING as usize {
        let (batch, input) = (s.batch, s.input);
        bail!("convolution: {batch} inputs of {input:?} exceed a device's 32-bit indices: split the batch")
    }
    let mut from = Vec::with_capacity(s.positions() * k);
    for (i, j, l) in index3(o0, o1, o2) {
        for (a, b, c) in index3(k0, k1, k2) {
            from.push(
                match (s.input_index(0, a, i), s.input_index(1, b, j), s.input_index(2, c, l)) {
                    (Some(i), Some(j), Some(l)) => ((i * s.input[1] + j) * s.input[2] + l) as u32,
                    _ => PADDING,
                },
            );
        }
    }
    Ok(from)
}

struct GatherOp {
    ids: Tensor,
    /// The ids on the host.
    from: Vec<u32>,
    /// The number of kernel offsets.
    k: usize,
}

impl Op<1> for GatherOp {
    const NAME: &'static str = "gather-columns";

    fn forward<S: Backend>(&self, [(x, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        let (ids, idl) = self.ids.storage_and_layout();
        let (batch, channels, _) = l.shape().dims3()?;
        let columns = x.index_select(S::of(&ids)?, l, idl, 2)?;
        Ok((columns, (batch, channels, self.from.len()).into()))
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        // Each kernel offset meets an input value at one position at most.
        let ((batch, channels, inputs), k) = (x.dims3()?, self.k);
        let mut to = vec![PADDING; inputs * k];
        for (column, from) in self.from.iter().enumerate().filter(|(_, from)| **from != PADDING) {
            to[*from as usize * k + column % k] = column as u32;
        }
        let met = grad.contiguous()?.index_select(&Tensor::new(to, grad.device())?, 2)?;
        Ok([Some(met.reshape((batch, channels, inputs, k))?.sum(3)?)])
    }
}
