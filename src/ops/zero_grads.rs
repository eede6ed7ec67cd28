//! Zero gradients for the operands of an output that is not computed: without rows there is no product, which some
//! backends refuse, and torch gives zeros.

use super::backend::Backend;
use super::op::{if_tracked, Custom, Op};
use candle_core::{Layout, Result, Shape, Tensor};

/// `y`, whose backward gives zeros to each operand that leads to a variable.
pub(super) fn with_zero_grads<'a>(
    y: Tensor,
    operands: impl IntoIterator<Item = &'a Tensor>,
) -> Result<Tensor> {
    let mut tracked = operands.into_iter().filter(|operand| operand.track_op());
    tracked.try_fold(y, |y, operand| y.apply_op2(operand, Custom(ZeroGradOp)))
}

struct ZeroGradOp;

impl Op<2> for ZeroGradOp {
    const NAME: &'static str = "zero-grad";

    fn forward<S: Backend>(&self, [(y, l), _]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        Ok((y.try_clone(l)?, l.shape().clone()))
    }

    fn backward(
        &self,
        [y, operand]: [&Tensor; 2],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let of_y = if_tracked(y, || Ok(grad.clone()))?;
        Ok([of_y, if_tracked(operand, || operand.detach().zeros_like())?])
    }
}
