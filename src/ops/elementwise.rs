//! Sums and products with operands that may be frozen. candle's own allocate a gradient of `x`'s size
//! for a frozen operand, and sum a bias's gradient slowly.

use super::backend::Backend;
use super::custom_gradient::with_zero_grads;
use super::op::{compute_dtype, if_tracked, Custom, Grads, Op};
use candle_core::op::{Add, Div};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// `x + c` of one shape, with a gradient for each operand that is tracked.
pub(crate) fn add(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    match (x.track_op(), c.track_op()) {
        (true, true) => x + c,
        (false, true) => add(c, x),
        (_, false) => add_frozen(x, c),
    }
}

/// `x + bias`, with a bias (n) along the dimension `dim` of `x`, and a gradient for each operand that is
/// tracked.
pub(crate) fn add_bias(x: &Tensor, bias: &Tensor, dim: usize) -> Result<Tensor> {
    let n = bias.dims1()?;
    let bias = bias.reshape([&[n][..], &vec![1; x.rank().saturating_sub(dim + 1)]].concat())?;
    if !bias.track_op() {
        return add_frozen(x, &bias.broadcast_as(x.shape())?);
    }
    same_device(x, &bias)?;
    match x.elem_count() {
        0 => with_zero_grads(x.clone(), [&bias]),
        _ => x.apply_op2(&bias, Custom(AddBiasOp)),
    }
}

/// `y` (.., n) plus a bias (n), if any.
pub(crate) fn plus_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        None => Ok(y),
        Some(bias) => add_bias(&y, bias, y.rank() - 1),
    }
}

/// An output (.., n) that `f` computes with its bias (n), which is added afterwards if it has a gradient.
pub(crate) fn with_frozen_bias(
    bias: Option<&Tensor>,
    f: impl FnOnce(Option<&Tensor>) -> Result<Tensor>,
) -> Result<Tensor> {
    match bias.filter(|bias| bias.track_op()) {
        None => f(bias),
        tracked => plus_bias(f(None)?, tracked),
    }
}

fn add_frozen(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    same_device(x, c)?;
    match x.elem_count() {
        // Devices refuse empty sums.
        0 => Ok(x.clone()),
        _ => x.apply_op1(Custom(FrozenOp::Add(c.detach()))),
    }
}

fn same_device(x: &Tensor, c: &Tensor) -> Result<()> {
    if !c.device().same_device(x.device()) {
        bail!(
            "the operands of a sum are on {:?} and {:?}",
            x.device().location(),
            c.device().location()
        )
    }
    Ok(())
}

/// `x / c` of one shape.
pub(crate) fn div_frozen(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    x.apply_op1(Custom(FrozenOp::Div(c.detach())))
}

/// `x` with a frozen operand of its shape.
enum FrozenOp {
    Add(Tensor),
    Div(Tensor),
}

impl Op<1> for FrozenOp {
    const NAME: &'static str = "frozen-operand";

    fn forward<S: Backend>(&self, [(x, l)]: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        let (Self::Add(c) | Self::Div(c)) = self;
        let (c, cl) = c.storage_and_layout();
        let c = S::of(&c)?;
        let y = match self {
            Self::Add(_) => x.binary_impl::<Add>(c, l, cl),
            Self::Div(_) => x.binary_impl::<Div>(c, l, cl),
        };
        Ok((y?, l.shape().clone()))
    }

    fn backward(&self, _: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        Ok([Some(match self {
            Self::Add(_) => grad.clone(),
            Self::Div(c) => (grad / c)?,
        })])
    }
}

/// The bias is (n, 1, ..) and broadcasts.
struct AddBiasOp;

impl Op<2> for AddBiasOp {
    const NAME: &'static str = "add-bias";

    fn forward<S: Backend>(&self, [(x, l), (b, bl)]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        let bl = bl.broadcast_as(l.shape().clone())?;
        Ok((x.binary_impl::<Add>(b, l, &bl)?, l.shape().clone()))
    }

    /// The bias's gradient is a sum over all other dimensions, computed by products with ones: candle's
    /// sum over leading dimensions is many times slower.
    fn backward(&self, [x, b]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<Grads<2>> {
        let sum = || {
            let g = grad.to_dtype(compute_dtype(grad.dtype()))?.contiguous()?;
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
