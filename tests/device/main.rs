//! Tests of the layers on the device under test: the first GPU of a build with `cuda`, or the CPU. They
//! are one program, because with `cuda` each program links 16 MB of kernels.
//!
//! `tests/cuda.sh` runs it on a GPU.

#[path = "../common/mod.rs"]
mod common;
mod contract;
mod dora;
mod edges;
mod golden;
mod gradients;
mod kept;
mod kinds;
mod modes;
mod options;
mod oracle;
mod quantized;
mod seeded;
mod transfers;
