//! `x + c` and `x ∘ c` with a frozen `c`, which candle's own operations would allot a gradient of
//! `x`'s size.

use super::backend::Backend;
use super::op::{Custom, Op};
use candle_core::op::{Add, Mul};
use candle_core::{bail, Layout, Result, Shape, Tensor};

/// `x + c`, with `c` of any shape that broadcasts to `x`'s, and gradients for those of the two that
/// are tracked.
pub(crate) fn plus(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    if !c.device().same_device(x.device()) {
        bail!("a sum of tensors on {:?} and {:?}", x.device().location(), c.device().location())
    }
    if x.elem_count() == 0 {
        // Devices refuse to add nothing.
        return Ok(x.clone());
    }
    let c = c.broadcast_as(x.shape())?;
    match (x.track_op(), c.track_op()) {
        (true, true) => x + c,
        (false, true) => c.apply_op1(Custom(Plus(x.detach()))),
        (_, false) => x.apply_op1(Custom(Plus(c))),
    }
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
