//! Values computed without a graph, as nodes whose backward is written out.
//!
//! candle's backward fills a gradient with zeros for every operand of every operation and adds to
//! it; a node that stands for several operations spares that, and frozen operands get none.

use candle_core::backend::BackendStorage;
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, CustomOp3, Device, Layout, MetalStorage, Result,
    Shape, Storage, Tensor,
};
use std::sync::{Mutex, PoisonError};

/// A value that is no node yet.
pub enum Value {
    /// By candle's operations: the node takes a copy.
    Made(Tensor),
    /// F32 on the CPU, without one.
    Fresh(Vec<f32>, Shape),
}

impl Value {
    /// Without a graph.
    pub fn tensor(self) -> Result<Tensor> {
        match self {
            Self::Made(y) => Ok(y),
            Self::Fresh(y, shape) => Tensor::from_vec(y, shape, &Device::Cpu),
        }
    }
}

impl From<Tensor> for Value {
    fn from(y: Tensor) -> Self {
        Self::Made(y)
    }
}

/// `y`, computed from `x`, as a node whose gradient towards `x` is `backward` of its own.
pub fn computed(
    x: &Tensor,
    y: impl Into<Value>,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    match x.track_op() {
        true => x.apply_op1(Computed::new(y.into(), backward)),
        false => y.into().tensor(),
    }
}

/// As [`computed`], from three operands.
pub fn computed3(
    [a, b, c]: [&Tensor; 3],
    y: impl Into<Value>,
    backward: impl Fn(&Tensor) -> Result<[Tensor; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    match a.track_op() || b.track_op() || c.track_op() {
        true => a.apply_op3(b, c, Computed::new(y.into(), backward)),
        false => y.into().tensor(),
    }
}

struct Computed<F> {
    /// Until the node is made, once.
    y: Mutex<Option<Value>>,
    backward: F,
}

const NAME: &str = "computed";

impl<F> Computed<F> {
    fn new(y: Value, backward: F) -> Self {
        Self { y: Mutex::new(Some(y)), backward }
    }

    fn take(&self) -> Result<Value> {
        match self.y.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(y) => Ok(y),
            None => bail!("{NAME}: made twice"),
        }
    }

    /// What candle's operations made, as a storage of its own.
    fn made(y: Tensor) -> Result<Tensor> {
        let y = if y.is_contiguous() { y } else { y.contiguous()? };
        // A storage is copied whole, whatever part of it a tensor is.
        if y.layout().start_offset() != 0 {
            bail!("{NAME}: a part of a larger tensor")
        }
        Ok(y)
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        let y = match self.take()? {
            Value::Fresh(y, shape) => return Ok((CpuStorage::F32(y), shape)),
            Value::Made(y) => Self::made(y)?,
        };
        let (y, layout) = y.storage_and_layout();
        let Storage::Cpu(y) = &*y else { bail!("{NAME}: not on the CPU") };
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        let y = Self::made(self.take()?.tensor()?)?;
        let (y, layout) = y.storage_and_layout();
        let Storage::Cuda(y) = &*y else { bail!("{NAME}: not on CUDA") };
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        let y = Self::made(self.take()?.tensor()?)?;
        let (y, layout) = y.storage_and_layout();
        let Storage::Metal(y) = &*y else { bail!("{NAME}: not on Metal") };
        Ok((y.try_clone(layout)?, layout.shape().clone()))
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> CustomOp1 for Computed<F> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some((self.backward)(grad)?))
    }
}

#[rustfmt::skip] // a line each for what takes three operands and uses none
impl<F: Fn(&Tensor) -> Result<[Tensor; 3]>> CustomOp3 for Computed<F> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self, _: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self, a: &Tensor, b: &Tensor, c: &Tensor, _: &Tensor, grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [ga, gb, gc] = (self.backward)(grad)?;
        let wanted = |x: &Tensor, gx| x.track_op().then_some(gx);
        Ok((wanted(a, ga), wanted(b, gb), wanted(c, gc)))
    }
}
