//! Measures `MPI_Allreduce`: the seconds for a size are α + β·bytes, measured for sizes from 8 bytes to 8 MiB.
//!
//! `mpirun -n 2 target/release/allreduce`; with `--mca btl self,tcp` through TCP on one machine.

use mpi::collective::SystemOperation;
use mpi::traits::{Communicator, CommunicatorCollectives};
use std::time::Instant;

const ROUNDS: usize = 101;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let universe = mpi::initialize().ok_or("MPI is initialised already")?;
    let world = universe.world();
    if world.size() != 2 {
        // The latency of more ranks is that of several messages, one after another.
        return Err(format!("{} ranks: α is measured with 2", world.size()).into());
    }
    let mut points = vec![];
    for values in (1..=21).step_by(2).map(|i| 1usize << i) {
        let (part, mut sum) = (vec![1f32; values], vec![0f32; values]);
        let mut times = vec![];
        for _ in 0..ROUNDS {
            world.barrier();
            let start = Instant::now();
            world.all_reduce_into(&part[..], &mut sum[..], SystemOperation::sum());
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        points.push(((4 * values) as f64, times[ROUNDS / 2]));
    }
    if world.rank() == 0 {
        for (bytes, time) in &points {
            println!("{bytes:>10} bytes {:>10.1} µs", 1e6 * time);
        }
        // α from the smallest size, β from the largest: a least-squares line would fit the largest alone.
        let (alpha, (bytes, time)) = (points[0].1, points[points.len() - 1]);
        println!("α = {:.1} µs", 1e6 * alpha);
        println!("β = {:.3} ns a byte", 1e9 * (time - alpha) / bytes);
    }
    Ok(())
}
