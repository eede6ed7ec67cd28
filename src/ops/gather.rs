//! A convolution's columns by gathering, and folded back by gathering too: devices add to indexed
//! places one after another.

use super::backend::Backend;
use super::conv::{product3, Sizes};
use super::op::{Custom, Op};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// What candle's `index_select` reads as a zero.
const PADDING: u32 = u32::MAX;

/// `x` (batch, in, spatial..) to its columns (batch, in, positions·k).
pub(super) fn gather(x: &Tensor, s: &Sizes) -> Result<Tensor> {
    let x = x.reshape((s.batch, s.c_in, s.input_len()))?.contiguous()?;
    let from = sources(s)?;
    let ids = Tensor::new(from.as_slice(), x.device())?;
    x.apply_op1(Custom(Gather { ids, from, k: s.geometry.kernel.iter().product() }))
}

/// The input value of each position and kernel offset.
fn sources(s: &Sizes) -> Result<Vec<u32>> {
    let [k0, k1, k2] = s.geometry.kernel;
    let [o0, o1, o2] = s.output;
    let k = k0 * k1 * k2;
    // The devices' kernels count values in 32 bits, and beyond that never end.
    let values = |n: usize| [s.batch, s.c_in, k].into_iter().fold(n, usize::saturating_mul);
    if values(s.positions().max(s.input_len())) >= PADDING as usize {
        let (batch, input) = (s.batch, s.input);
        bail!("convolution: {batch} inputs of {input:?} are too many for a device: split the batch")
    }
    let mut from = Vec::with_capacity(s.positions() * k);
    for (i, j, l) in product3(o0, o1, o2) {
        for (a, b, c) in product3(k0, k1, k2) {
            from.push(match (s.meets(0, a, i), s.meets(1, b, j), s.meets(2, c, l)) {
                (Some(i), Some(j), Some(l)) => ((i * s.input[1] + j) * s.input[2] + l) as u32,
                _ => PADDING,
            });
        }
    }
    Ok(from)
}

struct Gather {
    ids: Tensor,
    /// The same, at hand.
    from: Vec<u32>,
    /// Kernel offsets.
    k: usize,
}

impl Op<1> for Gather {
    const NAME: &'static str = "gather-columns";

    fn forward<S: Backend>(&self, [(x, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        let (ids, idl) = self.ids.storage_and_layout();
        let (batch, channels, _) = l.shape().dims3()?;
        let columns = x.index_select(S::of(&ids)?, l, idl, 2)?;
        Ok((columns, (batch, channels, self.from.len()).into()))
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        // An input meets each kernel offset at one position or none.
        let ((batch, channels, inputs), k) = (x.dims3()?, self.k);
        let mut to = vec![PADDING; inputs * k];
        for (column, from) in self.from.iter().enumerate().filter(|(_, from)| **from != PADDING) {
            to[*from as usize * k + column % k] = column as u32;
        }
        let met = grad.contiguous()?.index_select(&Tensor::new(to, grad.device())?, 2)?;
        Ok([Some(met.reshape((batch, channels, inputs, k))?.sum(3)?)])
    }
}
