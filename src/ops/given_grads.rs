//! A value whose gradients are known when it is computed.

use super::backend::Backend;
use super::low_rank::compute_dtype;
use super::op::{if_tracked, Custom, Op};
use candle_core::{Layout, Result, Shape, Tensor};

/// The scalar `value`, with the gradient that is given for each input.
pub(crate) fn with_grads(value: Tensor, grads: Vec<(Tensor, Tensor)>) -> Result<Tensor> {
    grads.into_iter().try_fold(value, |value, (input, grad)| {
        value.apply_op2(&input, Custom(GivenGradOp { grad, at_unit: false }))
    })
}

/// A scalar that begins the backward of `y` with the gradient `grad`.
pub(crate) fn upstream(y: &Tensor, grad: Tensor) -> Result<Tensor> {
    let zero = Tensor::zeros((), grad.dtype(), grad.device())?;
    let grad = grad.to_dtype(y.dtype())?;
    zero.apply_op2(y, Custom(GivenGradOp { grad, at_unit: true }))
}

struct GivenGradOp {
    grad: Tensor,
    /// Whether the value's own gradient is 1, which saves a pass over `grad`.
    at_unit: bool,
}

impl Op<2> for GivenGradOp {
    const NAME: &'static str = "given-grad";

    fn forward<S: Backend>(&self, [(value, l), _]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        Ok((value.try_clone(l)?, l.shape().clone()))
    }

    fn backward(
        &self,
        [value, input]: [&Tensor; 2],
        _: &Tensor,
        g: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let grad = if_tracked(input, || match self.at_unit {
            true => Ok(self.grad.clone()),
            false => {
                // Rounded once.
                let (grad, dtype) = (&self.grad, compute_dtype(self.grad.dtype()));
                grad.to_dtype(dtype)?.broadcast_mul(&g.to_dtype(dtype)?)?.to_dtype(grad.dtype())
            }
        })?;
        Ok([if_tracked(value, || Ok(g.clone()))?, grad])
    }
}
