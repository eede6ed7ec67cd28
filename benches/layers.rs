//! `cargo bench --bench layers [-- FILTER]`: criterion groups, in each this crate's layer and what a
//! user would have without it.

mod cases;
use criterion::Criterion;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> candle_core::Result<()> {
    // As one of rayon's threads: from any other, each parallel loop hands all its work over and waits.
    rayon::scope(|_| run())
}

fn run() -> candle_core::Result<()> {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    for mut case in cases::cases("")? {
        let mut group = criterion.benchmark_group(&case.group);
        let ours = std::iter::once(("loralib", &mut case.ours));
        for (name, run) in ours.chain(case.others.iter_mut().map(|(name, run)| (*name, run))) {
            group.bench_function(name, |b| b.iter(|| run().unwrap()));
        }
        group.finish();
    }
    criterion.final_summary();
    Ok(())
}
