//! All processes of the run, which MPI connects.

use crate::Result;
use candle_core::Tensor;
use loralib::train::Rank;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};
use mpi::Threading;

pub struct World {
    all: SimpleCommunicator,
    rank: Rank,
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
        let rank = Rank::new(all.rank() as usize, all.size() as usize)?;
        Ok(Self { all, rank, _universe: universe })
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The sum over all ranks of a 1-D tensor in F32, the same bits on each.
    pub fn sum(&self, part: &Tensor) -> candle_core::Result<Tensor> {
        let part_values = part.to_vec1::<f32>()?;
        let mut sum = vec![0f32; part_values.len()];
        self.all.all_reduce_into(&part_values[..], &mut sum[..], SystemOperation::sum());
        Tensor::new(sum, part.device())
    }

    /// The text that rank 0 gives.
    pub fn broadcast(&self, text: String) -> Result<String> {
        let (first, mut bytes) = (self.all.process_at_rank(0), text.into_bytes());
        let mut len = bytes.len() as u64;
        first.broadcast_into(&mut len);
        bytes.resize(len as usize, 0);
        first.broadcast_into(&mut bytes[..]);
        Ok(String::from_utf8(bytes)?)
    }

    /// Waits until every rank is here.
    pub fn wait(&self) {
        self.all.barrier();
    }

    /// Ends the processes of all ranks.
    pub fn abort(&self) -> ! {
        self.all.abort(1)
    }
}
