//! An operation with a backward of its own, and where it runs.
//!
//! An [`Op`] is written once for all backends, by what a [`Backend`] does. A [`Fused`] operation is one pass over memory
//! on the CPU, and elsewhere composed of candle's operations; [`run`] chooses. In both, frozen operands are fields of
//! the implementing type, so that candle's backward allocates no gradient for them.

use super::backend::Backend;
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, MetalStorage,
    Result, Shape, Tensor,
};

/// An operation on `N` tensors, on every backend.
pub(crate) trait Op<const N: usize>: Send + Sync + 'static {
    const NAME: &'static str;

    fn forward<S: Backend>(&self, args: [(&S, &Layout); N]) -> Result<(S, Shape)>;

    /// The gradient of each argument, or `None` if it leads to no variable, from the output `y` and its
    /// gradient. All tensors are detached: second derivatives are not supported.
    fn backward(&self, _: [&Tensor; N], _y: &Tensor, _grad: &Tensor) -> Result<Grads<N>> {
        bail!("{}: no gradient", Self::NAME)
    }
}

/// An operation on `N` tensors that is fused on the CPU.
pub(crate) trait Fused<const N: usize>: Send + Sync + 'static {
    const NAME: &'static str;

    /// The dtype that `forward` computes these arguments in, or `None` if they need `composed`.
    fn fused_dtype(&self, args: [&Tensor; N]) -> Option<DType> {
        matches!(args[0].dtype(), DType::F32 | DType::F16 | DType::BF16).then_some(DType::F32)
    }

    /// The output from contiguous arguments.
    fn forward(&self, args: [Operand; N]) -> Result<(CpuStorage, Shape)>;

    /// See [`Op::backward`].
    fn backward(&self, args: [&Tensor; N], y: &Tensor, grad: &Tensor) -> Result<Grads<N>>;

    /// The same output, composed of candle's operations.
    fn composed(&self, args: [&Tensor; N]) -> Result<Tensor>;
}

pub(crate) type Grads<const N: usize> = [Option<Tensor>; N];

/// A tensor on the CPU.
pub(crate) type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// Runs a fused operation: by its `forward` on the CPU, in F32 for half precision; for devices, other dtypes and empty
/// tensors composed of candle's operations.
pub(super) fn run<const N: usize, T: Fused<N>>(op: T, args: [&Tensor; N]) -> Result<Tensor>
where
    OnCpu<T>: Apply<N>,
{
    let x = args[0];
    let here = x.device().is_cpu() && x.elem_count() > 0 && x.rank() > 0;
    let Some(dtype) = op.fused_dtype(args).filter(|_| here) else { return op.composed(args) };
    let mut operands = args.map(Tensor::clone);
    for operand in &mut operands {
        *operand = operand.to_dtype(dtype)?.contiguous()?;
    }
    OnCpu(op).apply(operands.each_ref())?.to_dtype(x.dtype())
}

/// Adapts an [`Op`] to candle's `CustomOp` traits.
pub(crate) struct Custom<T>(pub T);

/// Adapts a [`Fused`] operation to candle's `CustomOp` traits.
pub(super) struct OnCpu<T>(T);

pub(super) trait Apply<const N: usize> {
    fn apply(self, args: [&Tensor; N]) -> Result<Tensor>;
}

// candle has a trait for each number of arguments.
macro_rules! custom_op {
    ($trait:ident $n:literal $apply:ident $grads:ty: $($x:ident $s:ident $l:ident),*) => {
        impl<T: Op<$n>> $trait for Custom<T> {
            fn name(&self) -> &'static str {
                T::NAME
            }
            fn cpu_fwd(&self, $($s: &CpuStorage, $l: &Layout),*) -> Result<(CpuStorage, Shape)> {
                self.0.forward([$(($s, $l)),*])
            }
            fn cuda_fwd(&self, $($s: &CudaStorage, $l: &Layout),*) -> Result<(CudaStorage, Shape)> {
                self.0.forward([$(($s, $l)),*])
            }
            fn metal_fwd(&self, $($s: &MetalStorage, $l: &Layout),*) -> Result<(MetalStorage, Shape)> {
                self.0.forward([$(($s, $l)),*])
            }
            fn bwd(&self, $($x: &Tensor,)* y: &Tensor, grad: &Tensor) -> Result<$grads> {
                let [$($x),*] = self.0.backward([$($x),*], y, grad)?;
                Ok(($($x),*))
            }
        }

        impl<T: Fused<$n>> $trait for OnCpu<T> {
            fn name(&self) -> &'static str {
                T::NAME
            }
            fn cpu_fwd(&self, $($s: &CpuStorage, $l: &Layout),*) -> Result<(CpuStorage, Shape)> {
                self.0.forward([$(($s, $l)),*])
            }
            fn bwd(&self, $($x: &Tensor,)* y: &Tensor, grad: &Tensor) -> Result<$grads> {
                let [$($x),*] = self.0.backward([$($x),*], y, grad)?;
                Ok(($($x),*))
            }
        }

        impl<T: Fused<$n>> Apply<$n> for OnCpu<T> {
            fn apply(self, [$($x),*]: [&Tensor; $n]) -> Result<Tensor> {
                Tensor::$apply($($x,)* self)
            }
        }
    };
}
custom_op! { CustomOp1 1 apply_op1 Option<Tensor>: x1 s1 l1 }
custom_op! { CustomOp2 2 apply_op2 (Option<Tensor>, Option<Tensor>): x1 s1 l1, x2 s2 l2 }
custom_op! {
    CustomOp3 3 apply_op3 (Option<Tensor>, Option<Tensor>, Option<Tensor>): x1 s1 l1, x2 s2 l2, x3 s3 l3
}

/// Whether a computation without a graph, and so without an operation to [`run`], is fused for `x`.
pub(super) fn is_f32_on_cpu(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Computes the gradient of `arg` if it leads to a variable. candle computes and keeps one for every
/// operand.
pub(crate) fn if_tracked(
    arg: &Tensor,
    grad: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    arg.track_op().then(grad).transpose()
}

/// The dtype in which sums beside a base of `dtype` are computed: F64 for F64, else F32.
pub(crate) fn compute_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}
