//! `cargo bench --bench ratios [-- FILTER] [--ask]`: this crate's layers beside what a user would
//! have without it, each pair run in turn, as medians in milliseconds and their ratio. FILTER is how the
//! names of the cases begin: `Conv`, or `"Linear 512x768 r 8 step"`. With --ask, this crate's layers alone:
//! the name of a case on the input is answered by its time.

#[path = "../cases/mod.rs"]
mod cases;
mod table;
mod timing;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> candle_core::Result<()> {
    // As one of rayon's threads: from any other, each parallel loop hands all its work over and waits.
    rayon::scope(|_| table::print(cases::cases))
}
