//! `x + c` and `x ∘ c` where candle's own operations would allot a frozen `c` a gradient of `x`'s size,
//! or sum a bias's slowly.

use super::backend::{wide, Backend};
use super::op::{if_tracked, Custom, Op};
use candle_core::op::{Add, Mul};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// `x + c`, both of one shape, with gradients for those of the two that are tracked.
pub(crate) fn plus(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    match (x.track_op(), c.track_op()) {
        (true, true) => x + c,
        (false, true) => plus(c, x),
        (_, false) => with_frozen(x, c),
    }
}

/// `x + bias`, with a bias (n) along the dimension `dim` of `x`, and gradients for those of the two
/// that are tracked.
pub(crate) fn biased(x: &Tensor, bias: &Tensor, dim: usize) -> Result<Tensor> {
    let n = bias.dims1()?;
    let bias = bias.reshape([&[n][..], &vec![1; x.rank().saturating_sub(dim + 1)]].concat())?;
    if !bias.track_op() {
        return with_frozen(x, &bias.broadcast_as(x.shape())?);
    }
    summable(x, &bias)?;
    match x.elem_count() {
        0 => Ok(x.clone()),
        _ => x.apply_op2(&bias, Custom(Biased)),
    }
}

fn with_frozen(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    summable(x, c)?;
    match x.elem_count() {
        // Devices refuse to add nothing.
        0 => Ok(x.clone()),
        _ => x.apply_op1(Custom(Plus(c.detach()))),
    }
}

fn summable(x: &Tensor, c: &Tensor) -> Result<()> {
    if !c.device().same_device(x.device()) {
        bail!("a sum of tensors on {:?} and {:?}", x.device().location(), c.device().location())
    }
    Ok(())
}

/// `x ∘ c`, with `c` of any shape that broadcasts to `x`'s.
pub(crate) fn times_frozen(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    x.apply_op1(Custom(Times(c.detach().broadcast_as(x.shape())?)))
}

struct Plus(Tensor);

impl Op<1> for Plus {
    const NAME: &'static str = "plus-frozen";

    fn forward<S: Backend>(&self, [(x, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        let (c, cl) = self.0.storage_and_layout();
        Ok((x.binary_impl::<Add>(S::of(&c)?, l, cl)?, l.shape().clone()))
    }

    fn backward(&self, _: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([Some(grad.clone())])
    }
}

/// With a bias (n, 1..), which broadcasts.
struct Biased;

impl Op<2> for Biased {
    const NAME: &'static str = "plus-bias";

    fn forward<S: Backend>(&self, [(x, l), (b, bl)]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        let bl = bl.broadcast_as(l.shape().clone())?;
        Ok((x.binary_impl::<Add>(b, l, &bl)?, l.shape().clone()))
    }

    /// The bias's is a sum over all else: as products with ones, which are many times faster than
    /// candle's sums over leading dimensions.
    fn backward(&self, [x, b]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let sum = || {
            let g = grad.to_dtype(wide(grad.dtype()))?.contiguous()?;
            let (n, after) = (b.dim(0)?, x.dims()[x.rank() + 1 - b.rank()..].iter().product());
            let before = x.elem_count() / (n * after);
            let ones = |dims: (usize, usize)| Tensor::ones(dims, g.dtype(), g.device());
            let g = match after {
                1 => g.reshape((before, n))?,
                _ => g.reshape((before * n, after))?.matmul(&ones((after, 1))?)?,
            };
            ones((1, before))?
                .matmul(&g.reshape((before, n))?)?
                .reshape(b.shape())?
                .to_dtype(b.dtype())
        };
        Ok([if_tracked(x, || Ok(grad.clone()))?, if_tracked(b, sum)?])
    }
}

struct Times(Tensor);

impl Op<1> for Times {
    const NAME: &'static str = "times-frozen";

    fn forward<S: Backend>(&self, [(x, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        let (c, cl) = self.0.storage_and_layout();
        Ok((x.binary_impl::<Mul>(S::of(&c)?, l, cl)?, l.shape().clone()))
    }

    fn backward(&self, _: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([Some((grad * &self.0)?)])
    }
}
