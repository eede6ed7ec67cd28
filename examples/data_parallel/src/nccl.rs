//! NCCL's sum over the GPUs of all ranks.

use crate::world::World;
use crate::Result;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::nccl::result::NcclError;
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};
use candle_core::cuda_backend::WrapErr;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Error, Layout, Shape, Tensor};
use std::cell::RefCell;
use std::mem::ManuallyDrop;

thread_local! {
    /// Of the thread that trains: a communicator is used by one at a time. It is not dropped, since that would abort
    /// the exchange of ranks that are not as far.
    static COMM: RefCell<Option<ManuallyDrop<Comm>>> = const { RefCell::new(None) };
}

/// The GPU number `ordinal` of this machine, connected with those of the other ranks.
pub fn connect(world: &World, ordinal: usize) -> Result<Device> {
    let device = world.agree(Device::new_cuda(ordinal).map_err(Into::into))?;
    let id = match world.rank().index() {
        0 => Id::new().map_err(error),
        _ => Ok(Id::uninit([0; 128])),
    };
    // Rank 0's reaches the others by MPI.
    let mut id = *world.agree(id.map_err(Into::into))?.internal();
    world.broadcast_into(&mut id);
    let stream = device.as_cuda_device()?.cuda_stream();
    let rank = world.rank();
    let comm =
        Comm::from_rank(stream, rank.index(), rank.count(), Id::uninit(id)).map_err(error)?;
    COMM.set(Some(ManuallyDrop::new(comm)));
    Ok(device)
}

/// The sum over all ranks of a tensor in F32 on this rank's GPU.
pub fn sum(part: &Tensor) -> candle_core::Result<Tensor> {
    part.apply_op1_no_bwd(&Sum)
}

fn error(error: NcclError) -> Error {
    Error::msg(format!("NCCL: {error:?}"))
}

struct Sum;

impl CustomOp1 for Sum {
    fn name(&self) -> &'static str {
        "nccl-sum"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("NCCL sums tensors of GPUs")
    }

    fn cuda_fwd(
        &self,
        part: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("NCCL sums contiguous tensors")
        };
        let device = part.device().clone();
        let part = part.as_cuda_slice::<f32>()?.slice(from..to);
        let mut sum = device.alloc_zeros::<f32>(to - from)?;
        COMM.with_borrow(|comm| match comm {
            Some(comm) => comm.all_reduce(&part, &mut sum, &ReduceOp::Sum).map_err(error),
            None => candle_core::bail!("another thread is connected by NCCL"),
        })?;
        // NCCL's errors come late.
        device.cuda_stream().synchronize().w()?;
        Ok((CudaStorage::wrap_cuda_slice(sum, device), layout.shape().clone()))
    }
}
