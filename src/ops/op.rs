//! An operation with a backward of its own, and where it runs.
//!
//! An [`Op`] is written once for all backends, by what a [`Backend`] does. A [`Fused`] operation is one pass over memory
//! on the CPU, forward and backward, and elsewhere a few of candle's operations; [`run`] chooses. Either way the graph
//! keeps the arguments and the output alone. Frozen operands are fields of the implementing type, so that candle's
//! backward allocates no gradient for them.

use super::backend::Backend;
use super::cpu::on_cpu;
use super::place::is_fused;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, InplaceOp1,
    Layout, MetalStorage, Result, Shape, Storage, Tensor,
};
use std::sync::{Mutex, PoisonError};
use std::{array, mem, ptr};

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

/// An operation on `N` tensors that is fused on the CPU. A gradient may have any floating dtype.
pub(crate) trait Fused<const N: usize>: Send + Sync + 'static {
    const NAME: &'static str;

    /// The dtype that `forward` computes these arguments in, or `None` if they need `composed`.
    fn fused_dtype(&self, args: [&Tensor; N]) -> Option<DType> {
        matches!(args[0].dtype(), DType::F32 | DType::F16 | DType::BF16).then_some(DType::F32)
    }

    /// The output from contiguous arguments in the fused dtype.
    fn forward(&self, args: [Operand; N]) -> Result<(CpuStorage, Shape)>;

    /// See [`Op::backward`]. The arguments are those of [`run`], `grad` is contiguous and in the fused dtype.
    fn backward(&self, args: [&Tensor; N], y: &Tensor, grad: &Tensor) -> Result<Grads<N>>;

    /// The same output in the dtype of the first argument, by candle's kernels or operations.
    fn composed(&self, args: [&Tensor; N]) -> Result<Tensor>;

    /// See [`Op::backward`]. `grad` is contiguous and has the output's dtype.
    fn composed_backward(&self, args: [&Tensor; N], y: &Tensor, grad: &Tensor) -> Result<Grads<N>>;
}

pub(crate) type Grads<const N: usize> = [Option<Tensor>; N];

/// A tensor on the CPU.
pub(crate) type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// Runs a fused operation: by its `forward` on the CPU, in F32 for half precision; for devices, other dtypes and empty
/// tensors by candle's operations.
pub(super) fn run<const N: usize, T: Fused<N>>(op: T, args: [&Tensor; N]) -> Result<Tensor>
where
    Computed<T>: Apply<N>,
{
    let x = args[0];
    if x.elem_count() == 0 || x.rank() == 0 {
        return op.composed(args);
    }
    let detached = args.map(Tensor::detach);
    let fused = op.fused_dtype(args).filter(|_| is_fused(x.device()));
    let y = match fused {
        Some(dtype) => {
            let args = detached.each_ref().map(|x| x.to_dtype(dtype)?.contiguous());
            let args = args.into_iter().collect::<Result<Vec<_>>>()?;
            let y = on_cpu(array::from_fn(|i| &args[i]), |args| op.forward(args))?;
            y.to_dtype(x.dtype())?
        }
        None => op.composed(detached.each_ref())?.contiguous()?,
    };
    if args.iter().all(|x| !x.track_op()) {
        return Ok(y);
    }
    let y = (take_storage(&y, &detached)?, y.shape().clone());
    Computed { op, fused, y: Mutex::new(Some(y)) }.apply(args)
}

/// A tensor in `dtype`, without gaps and without its graph: an operand of a fused backward.
pub(super) fn operand(x: &Tensor, dtype: DType) -> Result<Tensor> {
    x.detach().to_dtype(dtype)?.contiguous()
}

/// The storage of `y`, contiguous, without a copy unless it is also an argument's.
fn take_storage(y: &Tensor, args: &[Tensor]) -> Result<Storage> {
    {
        let (storage, layout) = y.storage_and_layout();
        let shared = |x: &Tensor| ptr::eq(&*x.storage_and_layout().0, &*storage);
        if layout.start_offset() > 0 || args.iter().any(shared) {
            return storage.try_clone(layout);
        }
    }
    let taken = Take(Mutex::new(None));
    y.inplace_op1(&taken)?;
    let Take(taken) = taken;
    taken
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .ok_or_else(|| Error::Msg("an operation's output has no storage".into()))
}

/// Leaves a single value in a tensor, which no one uses afterwards.
struct Take(Mutex<Option<Storage>>);

impl Take {
    fn take<S: BackendStorage>(&self, s: &mut S, wrap: impl FnOnce(S) -> Storage) -> Result<()>
    where
        S::Device: BackendDevice<Storage = S>,
    {
        let rest = s.device().zeros_impl(&().into(), s.dtype())?;
        let taken = wrap(mem::replace(s, rest));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(taken);
        Ok(())
    }
}

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take"
    }
    fn cpu_fwd(&self, s: &mut CpuStorage, _: &Layout) -> Result<()> {
        self.take(s, Storage::Cpu)
    }
    fn cuda_fwd(&self, s: &mut CudaStorage, _: &Layout) -> Result<()> {
        self.take(s, Storage::Cuda)
    }
    fn metal_fwd(&self, s: &mut MetalStorage, _: &Layout) -> Result<()> {
        self.take(s, Storage::Metal)
    }
}

/// Adapts an [`Op`] to candle's `CustomOp` traits.
pub(crate) struct Custom<T>(pub T);

/// A [`Fused`] operation with its output, for candle's `CustomOp` traits.
pub(super) struct Computed<T> {
    op: T,
    /// The dtype of the fused backward, or `None` for the composed one.
    fused: Option<DType>,
    /// Until the graph has taken it.
    y: Mutex<Option<(Storage, Shape)>>,
}

impl<T> Computed<T> {
    fn output<S: Backend>(&self, of: impl FnOnce(Storage) -> Option<S>) -> Result<(S, Shape)> {
        let y = self.y.lock().unwrap_or_else(PoisonError::into_inner).take();
        match y.and_then(|(storage, shape)| Some((of(storage)?, shape))) {
            Some(y) => Ok(y),
            None => bail!("the arguments of an operation are on several devices"),
        }
    }

    fn grads<const N: usize>(&self, xs: [&Tensor; N], y: &Tensor, g: &Tensor) -> Result<Grads<N>>
    where
        T: Fused<N>,
    {
        let mut grads = match self.fused {
            Some(dtype) => self.op.backward(xs, y, &operand(g, dtype)?)?,
            None => self.op.composed_backward(xs, &y.detach(), &operand(g, y.dtype())?)?,
        };
        for (grad, x) in grads.iter_mut().zip(xs) {
            *grad = grad.take().map(|grad| grad.to_dtype(x.dtype())).transpose()?;
        }
        Ok(grads)
    }
}

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

        impl<T: Fused<$n>> $trait for Computed<T> {
            fn name(&self) -> &'static str {
                T::NAME
            }
            fn cpu_fwd(&self, $(_: &CpuStorage, $l: &Layout),*) -> Result<(CpuStorage, Shape)> {
                let _ = ($($l),*);
                self.output(|y| if let Storage::Cpu(y) = y { Some(y) } else { None })
            }
            fn cuda_fwd(&self, $(_: &CudaStorage, $l: &Layout),*) -> Result<(CudaStorage, Shape)> {
                let _ = ($($l),*);
                self.output(|y| if let Storage::Cuda(y) = y { Some(y) } else { None })
            }
            fn metal_fwd(&self, $(_: &MetalStorage, $l: &Layout),*) -> Result<(MetalStorage, Shape)> {
                let _ = ($($l),*);
                self.output(|y| if let Storage::Metal(y) = y { Some(y) } else { None })
            }
            fn bwd(&self, $($x: &Tensor,)* y: &Tensor, grad: &Tensor) -> Result<$grads> {
                let [$($x),*] = self.grads([$($x),*], y, grad)?;
                Ok(($($x),*))
            }
        }

        impl<T: Fused<$n>> Apply<$n> for Computed<T> {
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
    is_fused(x.device()) && x.dtype() == DType::F32
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
