//! `cargo bench --bench model`: what training a model takes, LoRA beside full fine-tuning.
//!
//! A model of linear layers with GELU, and steps of AdamW. Each figure comes from processes of their
//! own, the methods in turn: the median time of a step, what is kept of gradients after backward, and
//! the growth of peak memory over that before the model was made. With `-- --plot FILE.svg`: how they
//! grow with the rank, the layers, and batch × length.

#[path = "../cases/device.rs"]
mod device;
mod memory;
#[path = "../cases/naive.rs"]
mod naive;
#[path = "../cases/peak.rs"]
mod peak;
mod plot;
mod training;

use candle_core::DType;
use device::device;
use std::error::Error;
use std::process::Command;
use training::{Figures, Method, Size, METHODS};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--one", method, layers, dim, rows, rank, dtype, ..] => {
            let (layers, dim, rows) = (layers.parse()?, dim.parse()?, rows.parse()?);
            let size = Size { layers, dim, rows, rank: rank.parse()?, dtype: dtype.parse()? };
            let method = Method::named(method)?;
            // As one of rayon's threads: from any other, each parallel loop hands all its work over and
            // waits.
            let figures = rayon::scope(|_| training::run(method, size))?;
            let Figures { step, gradients, peak } = figures;
            println!("{step} {gradients} {peak}");
            Ok(())
        }
        ["--plot", file, ..] => plot::growth(file),
        _ if device().is_cpu() => table(usual()),
        _ => {
            table(usual())?;
            table(Size { dtype: DType::BF16, ..usual() })
        }
    }
}

/// What does not vary.
fn usual() -> Size {
    let (dim, rows) = if device().is_cpu() { (1024, 256) } else { (2048, 8192) };
    Size { layers: 12, dim, rows, rank: 16, dtype: DType::F32 }
}

fn table(size: Size) -> Result<(), Box<dyn Error>> {
    let Size { layers, dim, rows, rank, dtype } = size;
    println!("{layers} layers of {dim}, batch × length {rows}, r {rank}, {dtype:?}");
    println!("{:<18} {:>10} {:>16} {:>12}", "", "step, ms", "gradients, MiB", "peak, MiB");
    for (method, f) in METHODS.iter().zip(measured(size)?) {
        println!("{:<18} {:>10.1} {:>16.2} {:>12.1}", method.name(), f.step, f.gradients, f.peak);
    }
    Ok(())
}

/// The figures of each method.
fn measured(size: Size) -> Result<Vec<Figures>, Box<dyn Error>> {
    let mut rounds = vec![vec![]; METHODS.len()];
    for _ in 0..ROUNDS {
        for (method, found) in METHODS.iter().zip(&mut rounds) {
            found.push(in_a_process(*method, size)?);
        }
    }
    Ok(rounds.into_iter().map(Figures::median).collect())
}

fn in_a_process(method: Method, size: Size) -> Result<Figures, Box<dyn Error>> {
    let Size { layers, dim, rows, rank, dtype } = size;
    let numbers = [layers, dim, rows, rank].map(|n| n.to_string());
    let mut command = Command::new(std::env::current_exe()?);
    let out = command.args(["--one", method.name()]).args(&numbers).arg(dtype.as_str()).output()?;
    let text = String::from_utf8(out.stdout)?;
    let found = text.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    match found[..] {
        [step, gradients, peak] => Ok(Figures { step, gradients, peak }),
        _ => Err(format!("{method:?}: {text}{}", String::from_utf8_lossy(&out.stderr)).into()),
    }
}
