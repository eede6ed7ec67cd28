//! A part of a model that keeps none of its activations: it runs again in the backward.

use super::backend::Backend;
use super::given_grads::upstream;
use super::op::{if_tracked, Custom, Op};
use candle_core::{bail, DType, Layout, Result, Shape, Tensor, Var};
use std::sync::{Mutex, PoisonError};

/// A part of a model, from its input to its output.
pub(crate) type Segment = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// `f(x)`, whose gradients reach `x` and `vars`. `f` uses no other variables.
pub(crate) fn checkpoint(x: &Tensor, vars: Vec<Var>, f: Segment) -> Result<Tensor> {
    if !x.track_op() && vars.is_empty() {
        return f(x);
    }
    let y = f(&x.detach())?.detach().contiguous()?;
    // candle's operations have three operands at most: the variables are one, which candle's own
    // operations split again in the backward.
    let double = vars.iter().any(|var| var.dtype() == DType::F64);
    let dtype = if double { DType::F64 } else { DType::F32 };
    let flat = vars.iter().map(|var| var.as_tensor().flatten_all()?.to_dtype(dtype));
    let flat = flat.collect::<Result<Vec<_>>>()?;
    let op = CheckpointOp { f, vars, y: Mutex::new(Some(y)) };
    match flat.is_empty() {
        true => x.contiguous()?.apply_op1(Custom(op)),
        false => x.contiguous()?.apply_op2(&Tensor::cat(&flat, 0)?, Custom(op)),
    }
}

struct CheckpointOp {
    f: Segment,
    vars: Vec<Var>,
    /// Until the forward has taken it.
    y: Mutex<Option<Tensor>>,
}

impl CheckpointOp {
    fn output<S: Backend>(&self) -> Result<(S, Shape)> {
        let Some(y) = self.y.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            bail!("checkpoint: its forward runs once")
        };
        let (storage, layout) = y.storage_and_layout();
        let copy = S::of(&storage)?.to_dtype(layout, y.dtype())?;
        Ok((copy, layout.shape().clone()))
    }

    /// The gradient of `x`, and those of the variables, flat and joined.
    fn grads(&self, x: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        let x = match x.track_op() {
            true => Var::from_tensor(&x.detach())?.into_inner(),
            false => x.detach(),
        };
        let y = (self.f)(&x)?;
        let mut grads = upstream(&y, grad.contiguous()?)?.backward()?;
        let gx = grads.remove(&x).filter(|_| x.track_op());
        let of = |var: &Var| match grads.get(var) {
            Some(grad) => grad.flatten_all(),
            None => var.as_detached_tensor().zeros_like()?.flatten_all(),
        };
        Ok((gx, self.vars.iter().map(of).collect::<Result<_>>()?))
    }
}

impl Op<1> for CheckpointOp {
    const NAME: &'static str = "checkpoint";

    fn forward<S: Backend>(&self, _: [(&S, &Layout); 1]) -> Result<(S, Shape)> {
        self.output()
    }

    fn backward(
        &self,
        [x]: [&Tensor; 1],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        Ok([self.grads(x, grad)?.0])
    }
}

impl Op<2> for CheckpointOp {
    const NAME: &'static str = "checkpoint";

    fn forward<S: Backend>(&self, _: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        self.output()
    }

    fn backward(
        &self,
        [x, flat]: [&Tensor; 2],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let (gx, vars) = self.grads(x, grad)?;
        let join = || {
            let vars = vars.iter().map(|grad| grad.to_dtype(flat.dtype()));
            Tensor::cat(&vars.collect::<Result<Vec<_>>>()?, 0)
        };
        Ok([gx, if_tracked(flat, join)?])
    }
}
