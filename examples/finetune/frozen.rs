//! `x·c` and `x + c` with a constant `c` that gets no gradient.
//!
//! candle's backward computes and keeps a gradient for every operand, frozen or not: for the gains
//! and biases of GPT-2's frozen norms, and for its mask, that is as much memory again as the
//! activations.

use candle_core::backend::BackendStorage;
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};

/// `x·c`, with `c` broadcast; candle's own product where `c` is trained.
pub fn scaled(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    let c = c.clone();
    match c.track_op() {
        true => x.broadcast_mul(&c),
        false => {
            let y = x.detach().broadcast_mul(&c)?;
            with_backward(x, y, move |grad| grad.broadcast_mul(&c))
        }
    }
}

/// `x + c`, with `c` broadcast; candle's own sum where `c` is trained.
pub fn shifted(x: &Tensor, c: &Tensor) -> Result<Tensor> {
    match c.track_op() {
        true => x.broadcast_add(c),
        false => with_backward(x, x.detach().broadcast_add(c)?, |grad| Ok(grad.clone())),
    }
}

/// `y`, computed from `x` without a graph, as a node whose gradient towards `x` is `backward` of
/// its own.
fn with_backward(
    x: &Tensor,
    y: Tensor,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    match x.track_op() {
        true => x.apply_op1(Computed { y, backward }),
        false => Ok(y),
    }
}

struct Computed<F> {
    y: Tensor,
    backward: F,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> CustomOp1 for Computed<F> {
    fn name(&self) -> &'static str {
        "computed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let (y, layout) = self.y.storage_and_layout();
        let Storage::Cpu(y) = &*y else { bail!("{}: not on the CPU", self.name()) };
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let (y, layout) = self.y.storage_and_layout();
        let Storage::Cuda(y) = &*y else { bail!("{}: not on CUDA", self.name()) };
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        let (y, layout) = self.y.storage_and_layout();
        let Storage::Metal(y) = &*y else { bail!("{}: not on Metal", self.name()) };
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some((self.backward)(grad)?))
    }
}
