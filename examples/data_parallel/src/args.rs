//! The flags.

use clap::{Parser, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;

/// Trains an adapter on text with as many processes as `mpirun -n N` starts.
///
/// Every rank must have the same flags. The base is a small byte-level transformer with random weights.
#[derive(Parser, Serialize)]
pub struct Args {
    /// Text to train on, in UTF-8 and on every machine, instead of the embedded one
    #[arg(long, value_name = "FILE")]
    #[serde(skip)] // Its content is compared.
    pub text: Option<PathBuf>,
    /// Steps of the whole run, those before --resume included
    #[arg(long, default_value_t = 50)]
    pub steps: usize,
    /// Sequences a step, of all ranks together
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Bytes in a sequence
    #[arg(long, default_value_t = 128)]
    pub context: usize,
    /// The base's hidden size, a multiple of 32
    #[arg(long, default_value_t = 256)]
    pub width: usize,
    /// The base's blocks
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// The rank of the adapter's low-rank update
    #[arg(long, default_value_t = 8)]
    pub r: usize,
    /// The adapter's strength: its update is scaled by alpha / r
    #[arg(long, default_value_t = 16.)]
    pub alpha: f64,
    /// The probability with which a value of the adapter's input is dropped
    #[arg(long, default_value_t = 0.)]
    pub dropout: f32,
    /// The learning rate
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    /// Seed of the base, the adapter, the order of sequences and of dropout
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Steps between checkpoints, at which the ranks' variables are also compared
    #[arg(long, default_value_t = 10)]
    pub every: usize,
    /// Continues from the last checkpoint in --out, which any number of ranks may have written
    #[arg(long)]
    pub resume: bool,
    /// The folder for adapter.safetensors, state.safetensors and report.json; with --resume, ranks on other
    /// machines read it too
    #[arg(long, value_name = "FOLDER", default_value = "target/data_parallel")]
    #[serde(skip)] // Machines may mount it elsewhere.
    pub out: PathBuf,
    /// Trains on a GPU for each rank, and sums by NCCL: needs a build with --features nccl
    #[arg(long)]
    pub gpu: bool,
    /// To see what follows: the last rank does this in its sixth step
    #[arg(long, value_enum)]
    pub fault: Option<Fault>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
pub enum Fault {
    /// Its loss is NaN
    Nan,
    /// Its forward fails
    Error,
    /// Its adapter changes
    Drift,
}
