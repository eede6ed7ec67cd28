//! Activation checkpointing: a segment of a model keeps none of its activations, and runs again in the backward.

use super::backend::Backend;
use super::custom_gradient::{leaf, upstream};
use super::op::{if_tracked, Custom, Grads, Op};
use candle_core::{bail, DType, Layout, Result, Shape, Tensor, Var};
use std::sync::{Mutex, PoisonError};

/// A part of a model, from its input to its output.
pub(crate) type Segment = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// The variables of a segment, and all others that could be used in it by mistake.
pub(crate) struct SegmentVars {
    /// The path that those inside begin with.
    pub module: String,
    pub inside: Vec<(String, Var)>,
    pub outside: Vec<(String, Var)>,
    /// Variables of other adapters, with the paths of their layers.
    pub foreign: Vec<(String, Tensor)>,
}

/// `f(x)`, whose gradients reach `x` and the variables inside.
pub(crate) fn recompute(x: &Tensor, vars: SegmentVars, f: Segment) -> Result<Tensor> {
    let y = f(&leaf(x)?)?;
    if !x.track_op() && !y.track_op() {
        return Ok(y);
    }
    if !x.track_op() && vars.inside.is_empty() {
        let known = vars.outside.first().map(|(name, _)| format!(": the first is {name:?}"));
        bail!(
            "checkpoint: the segment uses variables, but the adapter has none in the module {:?}{}",
            vars.module,
            known.unwrap_or_default()
        )
    }
    let y = y.detach().contiguous()?;
    // candle's operations have three operands at most: the variables are one, which candle's own
    // operations split again in the backward.
    let double = vars.inside.iter().any(|(_, var)| var.dtype() == DType::F64);
    let dtype = if double { DType::F64 } else { DType::F32 };
    let flat = vars.inside.iter().map(|(_, var)| var.as_tensor().flatten_all()?.to_dtype(dtype));
    let flat = flat.collect::<Result<Vec<_>>>()?;
    let flat = match flat.is_empty() {
        true => Tensor::zeros(1, dtype, x.device())?,
        false => Tensor::cat(&flat, 0)?,
    };
    x.contiguous()?.apply_op2(&flat, Custom(RecomputeOp { f, vars, y: Mutex::new(Some(y)) }))
}

struct RecomputeOp {
    f: Segment,
    vars: SegmentVars,
    /// Until the forward has taken it.
    y: Mutex<Option<Tensor>>,
}

impl RecomputeOp {
    /// The gradient of `x`, and those of the variables, flat.
    fn grads(&self, x: &Tensor, y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Vec<Tensor>)> {
        let (wants_grad, x) = (x.track_op(), leaf(x)?);
        let again = (self.f)(&x)?;
        // On a device this would wait for it.
        if y.device().is_cpu() && differ(y, &again)? {
            bail!(
                "checkpoint: the segment gave another output in the backward: it has dropout without a seed, \
                 or its mode or variables have changed"
            )
        }
        let mut grads = upstream(&again, g.contiguous()?)?.backward()?;
        let used = self.vars.outside.iter().find(|(_, var)| grads.get(var).is_some());
        if let Some((name, _)) = used {
            bail!(
                "checkpoint: the segment uses the variable {name:?}, which is outside of its module {:?}",
                self.vars.module
            )
        }
        if let Some((path, _)) = self.vars.foreign.iter().find(|(_, t)| grads.get(t).is_some()) {
            bail!(
                "checkpoint: the segment trains another adapter in the layer {path:?}: call `checkpoint` of the one \
                 that is chosen; a sum of adapters that train has none"
            )
        }
        let gx = if wants_grad { grads.remove(&x) } else { None };
        if wants_grad && gx.is_none() {
            bail!(
                "checkpoint: an operation of the segment cuts the graph: its input has no gradient"
            )
        }
        let of = |(name, var): &(String, Var)| {
            match grads.get(var) {
            Some(grad) => grad.flatten_all(),
            None => bail!(
                "checkpoint: the variable {name:?} has no gradient: an operation of the segment cuts the \
                 graph, or the segment does not use it, as where another adapter is chosen"
            ),
        }
        };
        Ok((gx, self.vars.inside.iter().map(of).collect::<Result<_>>()?))
    }
}

/// Whether a value differs; NaN is not compared.
pub(crate) fn differ(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.elem_count() == 0 {
        return Ok(false);
    }
    let (a, b) = (a.detach(), b.detach());
    let unequal = ((a.lt(&b)? + a.gt(&b)?)?).to_dtype(DType::U32)?;
    Ok(unequal.flatten_all()?.max_all()?.to_scalar::<u32>()? > 0)
}

impl Op<2> for RecomputeOp {
    const NAME: &'static str = "checkpoint";

    fn forward<S: Backend>(&self, _: [(&S, &Layout); 2]) -> Result<(S, Shape)> {
        let Some(y) = self.y.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            bail!("checkpoint: its forward runs once")
        };
        let (storage, layout) = y.storage_and_layout();
        Ok((S::of(&storage)?.try_clone(layout)?, layout.shape().clone()))
    }

    fn backward(&self, [x, flat]: [&Tensor; 2], y: &Tensor, grad: &Tensor) -> Result<Grads<2>> {
        let (gx, vars) = self.grads(x, y, grad)?;
        let join = || {
            let vars = vars.iter().map(|grad| grad.to_dtype(flat.dtype()));
            Tensor::cat(&vars.collect::<Result<Vec<_>>>()?, 0)
        };
        Ok([gx, if_tracked(flat, join)?])
    }
}
