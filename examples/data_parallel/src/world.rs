//! All processes of the run, which MPI connects.

use crate::Result;
use candle_core::{Device, Tensor};
use loralib::train::Process;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Equivalence, Root};
use mpi::Threading;
use std::cell::Cell;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a rank that failed waits for the others to report the same.
const REPORTS: Duration = Duration::from_secs(2);

pub struct World {
    all: SimpleCommunicator,
    rank: Process,
    summed: Cell<usize>,
    /// MPI ends when it is dropped.
    _universe: Universe,
}

impl World {
    /// Connects this process with those that `mpirun` has started; without `mpirun` it is the only one.
    pub fn connect() -> Result<Self> {
        // Only one thread calls MPI, but it need not be the first of the process.
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or("MPI is initialised already")?;
        if threading < Threading::Serialized {
            return Err("this MPI was built without support for threads".into());
        }
        let all = universe.world();
        let rank = Process::new(all.rank() as usize, all.size() as usize)?;
        Ok(Self { all, rank, summed: Cell::new(0), _universe: universe })
    }

    pub fn rank(&self) -> Process {
        self.rank
    }

    /// The CPU, or a GPU for each rank of a machine.
    pub fn device(&self, gpu: bool) -> Result<Device> {
        if !gpu {
            return Ok(Device::Cpu);
        }
        #[cfg(feature = "nccl")]
        return crate::nccl::connect(self, self.all.split_shared(0).rank() as usize);
        #[cfg(not(feature = "nccl"))]
        Err("--gpu needs a build with --features nccl".into())
    }

    /// The sum over all ranks of a 1-D tensor in F32, the same bits on each: by NCCL for a GPU's, else by MPI.
    pub fn sum(&self, part: &Tensor) -> candle_core::Result<Tensor> {
        self.summed.set(self.summed.get() + part.elem_count() * part.dtype().size_in_bytes());
        #[cfg(feature = "nccl")]
        if part.device().is_cuda() {
            return crate::nccl::sum(part);
        }
        let part_values = part.to_vec1::<f32>()?;
        let mut sum = vec![0f32; part_values.len()];
        self.all.all_reduce_into(&part_values[..], &mut sum[..], SystemOperation::sum());
        Tensor::new(sum, part.device())
    }

    /// The bytes that this rank has given to be summed.
    pub fn summed(&self) -> usize {
        self.summed.get()
    }

    /// The text that rank 0 gives.
    pub fn broadcast(&self, text: String) -> Result<String> {
        let (mut len, mut bytes) = (text.len() as u64, text.into_bytes());
        self.broadcast_into(std::slice::from_mut(&mut len));
        bytes.resize(len as usize, 0);
        self.broadcast_into(&mut bytes);
        Ok(String::from_utf8(bytes)?)
    }

    /// Replaces `values` by those of rank 0.
    pub fn broadcast_into<T: Equivalence>(&self, values: &mut [T]) {
        self.all.process_at_rank(0).broadcast_into(values);
    }

    /// This rank's result where no rank has an error; an error on all ranks where one has.
    pub fn agree<T>(&self, own: Result<T>) -> Result<T> {
        let none = self.all.size();
        let (failed, mut first) = (if own.is_ok() { none } else { self.all.rank() }, none);
        self.all.all_reduce_into(&failed, &mut first, SystemOperation::min());
        match own {
            Ok(_) if first < none => Err(format!("rank {first} failed: its error says why").into()),
            own => own,
        }
    }

    /// Waits until every rank is here.
    pub fn wait(&self) {
        self.all.barrier();
    }

    /// Ends the processes of all ranks, when all have failed or after two seconds.
    pub fn abort(&self) -> ! {
        let (start, mut all_failed) = (Instant::now(), self.all.immediate_barrier());
        while let Err(waiting) = all_failed.test() {
            if start.elapsed() > REPORTS {
                self.all.abort(1);
            }
            all_failed = waiting;
            sleep(Duration::from_millis(10));
        }
        self.all.abort(1)
    }
}
