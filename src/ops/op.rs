//! An operation with a backward of its own, written once for all backends.

use super::backend::Backend;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape,
    Tensor,
};

/// An operation on `N` tensors. Frozen operands are fields of the implementing type, so that candle's
/// backward allocates no gradient for them.
pub(crate) trait Op<const N: usize>: Send + Sync + 'static {
    const NAME: &'static str;

    fn forward<S: Backend>(&self, args: [(&S, &Layout); N]) -> Result<(S, Shape)>;

    /// The gradient of each argument, or `None` if it leads to no variable, from the output `y` and its
    /// gradient. All tensors are detached: second derivatives are not supported.
    fn backward(
        &self,
        args: [&Tensor; N],
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]>;
}

/// Adapts an [`Op`] to candle's `CustomOp` traits.
pub(crate) struct Custom<T>(pub T);

impl<T: Op<1>> CustomOp1 for Custom<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.forward([(s, l)])
    }
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.forward([(s, l)])
    }
    fn metal_fwd(&self, s: &MetalStorage, l: &Layout) -> Result<(MetalStorage, Shape)> {
        self.0.forward([(s, l)])
    }
    fn bwd(&self, arg: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [g] = self.0.backward([arg], y, grad)?;
        Ok(g)
    }
}

impl<T: Op<2>> CustomOp2 for Custom<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.forward([(s1, l1), (s2, l2)])
    }
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.forward([(s1, l1), (s2, l2)])
    }
    fn metal_fwd(
        &self,
        s1: &MetalStorage,
        l1: &Layout,
        s2: &MetalStorage,
        l2: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.0.forward([(s1, l1), (s2, l2)])
    }
    fn bwd(
        &self,
        arg1: &Tensor,
        arg2: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [g1, g2] = self.0.backward([arg1, arg2], y, grad)?;
        Ok((g1, g2))
    }
}

impl<T: Op<3>> CustomOp3 for Custom<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.forward([(s1, l1), (s2, l2), (s3, l3)])
    }
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.forward([(s1, l1), (s2, l2), (s3, l3)])
    }
    fn metal_fwd(
        &self,
        s1: &MetalStorage,
        l1: &Layout,
        s2: &MetalStorage,
        l2: &Layout,
        s3: &MetalStorage,
        l3: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.0.forward([(s1, l1), (s2, l2), (s3, l3)])
    }
    fn bwd(
        &self,
        arg1: &Tensor,
        arg2: &Tensor,
        arg3: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [g1, g2, g3] = self.0.backward([arg1, arg2, arg3], y, grad)?;
        Ok((g1, g2, g3))
    }
}

/// Computes the gradient of `arg` if it leads to a variable. candle computes and keeps one for every
/// operand.
pub(crate) fn if_tracked(
    arg: &Tensor,
    grad: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    arg.track_op().then(grad).transpose()
}
