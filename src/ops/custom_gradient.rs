//! A value with gradients that the caller gives, as in `jax.custom_gradient`.

use super::backend::Backend;
use super::op::{compute_dtype, if_tracked, Custom, Grads, Op};
use candle_core::{Layout, Result, Shape, Tensor, Var};

/// `value`, with the gradient that is given for each input: of a scalar, or of the vector's element for each row.
pub(crate) fn with_grads(value: Tensor, grads: Vec<(Tensor, Tensor)>) -> Result<Tensor> {
    grads.into_iter().try_fold(value, |value, (input, grad)| {
        value.apply_op2(&input, Custom(CustomGradient::Scaled(grad)))
    })
}

/// `value`, whose gradient becomes those of two inputs by `backward`. They are asked for where an input is tracked.
pub(crate) fn with_backward(
    value: &Tensor,
    inputs: [&Tensor; 2],
    backward: impl Fn(&Tensor) -> Result<[Option<Tensor>; 2]> + Send + Sync + 'static,
) -> Result<Tensor> {
    value.apply_op3(inputs[0], inputs[1], Custom(CustomBackward(backward)))
}

struct CustomBackward<F>(F);

impl<F> Op<3> for CustomBackward<F>
where
    F: Fn(&Tensor) -> Result<[Option<Tensor>; 2]> + Send + Sync + 'static,
{
    const NAME: &'static str = "custom-backward";

    fn forward<S: Backend>(&self, [(value, l), ..]: [(&S, &Layout); 3]) -> Result<(S, Shape)> {
        Ok((value.try_clone(l)?, l.shape().clone()))
    }

    fn backward(&self, _: [&Tensor; 3], _: &Tensor, g: &Tensor) -> Result<Grads<3>> {
        let [a, b] = self.0(g)?;
        Ok([None, a, b])
    }
}

/// A scalar that begins the backward of `y` with the gradient `grad`.
pub(crate) fn upstream(y: &Tensor, grad: Tensor) -> Result<Tensor> {
    let zero = Tensor::zeros((), grad.dtype(), grad.device())?;
    zero.apply_op2(y, Custom(CustomGradient::Whole(grad.to_dtype(y.dtype())?)))
}

/// `x` without its graph, as a variable if it is tracked: for operands that are not tracked, some operations have other
/// kernels, which round differently.
pub(super) fn leaf(x: &Tensor) -> Result<Tensor> {
    match x.track_op() {
        true => Ok(Var::from_tensor(&x.detach())?.into_inner()),
        false => Ok(x.detach()),
    }
}

/// `y`, whose backward gives zeros to each operand that leads to a variable, as torch does where there are no rows:
/// some backends refuse empty products.
pub(super) fn with_zero_grads<'a>(
    y: Tensor,
    operands: impl IntoIterator<Item = &'a Tensor>,
) -> Result<Tensor> {
    let mut tracked = operands.into_iter().filter(|operand| operand.track_op());
    tracked.try_fold(y, |y, operand| y.apply_op2(operand, Custom(CustomGradient::Zero)))
}

/// A value, with the gradient of another tensor.
enum CustomGradient {
    Zero,
    /// Multiplied by the gradient of the value: a scalar, or one for each row.
    Scaled(Tensor),
    /// Taken as it is, for a value whose own gradient is 1: saves a pass.
    Whole(Tensor),
}

impl Op<2> for CustomGradient {
    const NAME: &'static str = "custom-gradient";

    fn forward<S: Backend>(&self, [(value, l), _]: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        Ok((value.try_clone(l)?, l.shape().clone()))
    }

    fn backward(&self, [value, x]: [&Tensor; 2], _: &Tensor, g: &Tensor) -> Result<Grads<2>> {
        let gx = if_tracked(x, || match self {
            Self::Zero => x.detach().zeros_like(),
            Self::Whole(grad) => Ok(grad.clone()),
            Self::Scaled(grad) => {
                // Rounded once.
                let dtype = compute_dtype(grad.dtype());
                let g = if g.rank() == 0 { g.clone() } else { g.unsqueeze(1)? };
                grad.to_dtype(dtype)?.broadcast_mul(&g.to_dtype(dtype)?)?.to_dtype(x.dtype())
            }
        })?;
        Ok([if_tracked(value, || Ok(g.clone()))?, gx])
    }
}
