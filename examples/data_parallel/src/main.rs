//! Data-parallel training of an adapter over MPI: each rank computes the gradients of its share of the batch, and only
//! the adapter's gradients travel.
//!
//! `mpirun -n 2 --bind-to none -x RAYON_NUM_THREADS=1 target/release/data_parallel`; `--help` lists the flags.

mod args;
mod base;
mod data;
mod model;
#[cfg(feature = "nccl")]
mod nccl;
mod train;
mod world;

#[path = "../../common/corpus.rs"]
#[allow(dead_code)] // hotels
mod corpus;
#[path = "../../common/rng.rs"]
mod rng;

use args::Args;
use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use world::World;

/// Training allots and frees many tensors of the same sizes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let args = Args::parse();
    // The backtrace that candle's errors carry says nothing to whoever mistyped a path.
    std::env::set_var("RUST_LIB_BACKTRACE", "0");
    // A panic that unwinds would end MPI here, which waits for the other ranks.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    // As one of rayon's threads: from any other, each parallel loop hands all its work over and waits.
    rayon::scope(|_| {
        let world = match World::connect() {
            Ok(world) => world,
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::FAILURE;
            }
        };
        if let Err(error) = train::train(&args, &world) {
            // Written at once, since all ranks may write.
            let line = format!("error: rank {}: {error}\n", world.rank().index());
            let _ = std::io::stderr().write_all(line.as_bytes());
            world.abort();
        }
        ExitCode::SUCCESS
    })
}
