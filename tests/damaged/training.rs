//! Training that is killed at any moment, or whose disk is full, goes on from its last state, to the same end.

use crate::{alone, Random, CPU};
use candle_core::{DType, Module, Tensor};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder};
use lora::nn::{linear_no_bias, Linear};
use lora::train::AdamW;
use lora::{Adapter, LoraConfig};
use loralib as lora;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const FOLDER: &str = "LORALIB_TEST_TRAINING_FOLDER";
const STATE: &str = "state.safetensors";
const STEPS: usize = 100;

/// A layer whose state is large beside a step, with dropout.
struct Run {
    adapter: Adapter,
    model: Linear,
    opt: AdamW,
}

impl Run {
    fn new(seed: u64) -> lora::Result<Self> {
        let cfg = LoraConfig { r: 2, lora_alpha: 4., lora_dropout: 0.3, ..Default::default() };
        let weight = Tensor::arange(0f32, 80_000., &CPU)?.sin()?.reshape((4, 20_000))?;
        let base = HashMap::from([("q.weight".to_owned(), weight)]);
        let base = VarBuilder::from_tensors(base, DType::F32, &CPU);
        let adapter = Adapter::new(cfg).targets(["q"]).seed(seed);
        let model = linear_no_bias(20_000, 4, adapter.var_builder(base).pp("q"))?;
        let params = ParamsAdamW { lr: 1e-3, ..Default::default() };
        let opt = AdamW::named(adapter.named_vars()?, params)?;
        Ok(Self { adapter, model, opt })
    }

    fn step(&mut self) -> lora::Result<()> {
        let x = Tensor::arange(0f32, 40_000., &CPU)?.cos()?.reshape((2, 20_000))?;
        Ok(self.opt.backward_step(&self.model.forward(&x)?.sqr()?.mean_all()?)?)
    }

    fn save(&self, folder: &Path) -> lora::Result<()> {
        self.opt.save(folder.join(STATE), &self.adapter.dropout_position())
    }

    fn resume(seed: u64, folder: &Path) -> lora::Result<Self> {
        let mut run = Self::new(seed)?;
        let position = run.opt.load(folder.join(STATE))?;
        run.adapter.set_dropout_position(position)?;
        Ok(run)
    }
}

/// After these steps, in a folder of its own.
fn trained(steps: usize) -> lora::Result<(tempfile::TempDir, Run)> {
    let (dir, mut run) = (tempfile::tempdir()?, Run::new(1)?);
    (0..steps).try_for_each(|_| run.step())?;
    run.save(dir.path())?;
    Ok((dir, run))
}

fn child(test: &str, program: &[&str], folder: &Path) -> std::io::Result<Command> {
    let test_program = std::env::current_exe()?;
    let mut command = match program.split_first() {
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(test_program);
            command
        }
        None => Command::new(test_program),
    };
    command.args([test, "--exact", "--test-threads=1"]).env(FOLDER, folder).stdout(Stdio::null());
    Ok(command)
}

/// Not a test: the process that the next test starts and kills.
#[test]
fn trainer() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let mut run = Run::resume(1, &folder).unwrap();
    while run.opt.steps() < STEPS {
        run.step().unwrap();
        run.save(&folder).unwrap();
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_in_the_same_bits() -> lora::Result<()> {
    let _alone = alone();
    let (unbroken, _) = trained(STEPS)?;
    let (dir, _) = trained(0)?;
    let (mut r, mut kills, mut stops) = (Random(11), 0, BTreeSet::new());
    loop {
        let mut child = child("training::trainer", &[], dir.path())?.spawn()?;
        std::thread::sleep(Duration::from_micros(10_000 + r.below(40_000) as u64));
        child.kill()?;
        if child.wait()?.success() {
            break;
        }
        kills += 1;
        stops.insert(Run::resume(1, dir.path())?.opt.steps());
    }
    println!("{kills} kills, at {} different steps", stops.len());
    assert!(stops.len() >= 5, "{stops:?}");
    assert!(fs::read(dir.path().join(STATE))? == fs::read(unbroken.path().join(STATE))?);
    Ok(())
}

#[test]
fn a_lost_seed_gives_another_run() -> lora::Result<()> {
    let _alone = alone();
    let (dir, mut unbroken) = trained(3)?;
    unbroken.step()?;
    let factors = |run: &Run| -> lora::Result<Vec<Vec<f32>>> {
        let values = |(_, var): (_, candle_core::Var)| Ok(var.flatten_all()?.to_vec1()?);
        run.adapter.named_vars()?.into_iter().map(values).collect()
    };
    for seed in [1, 2] {
        let mut resumed = Run::resume(seed, dir.path())?;
        resumed.step()?;
        assert_eq!(factors(&resumed)? == factors(&unbroken)?, seed == 1, "seed {seed}");
    }
    Ok(())
}

/// Not a test: the process whose files may not become larger than the next test allows.
#[test]
fn saver() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let mut run = Run::resume(1, &folder).unwrap();
    run.step().unwrap();
    eprintln!("{}", run.save(&folder).unwrap_err());
    eprintln!("{}", run.adapter.save_pretrained(&folder).unwrap_err());
}

/// The error of a file beyond the limit is the only difference from a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_and_leaves_the_last_files() -> lora::Result<()> {
    let _alone = alone();
    let (dir, run) = trained(3)?;
    run.adapter.save_pretrained(dir.path())?;
    let files = || -> std::io::Result<Vec<_>> {
        let mut files = vec![];
        for entry in fs::read_dir(dir.path())? {
            let path = entry?.path();
            files.push((path.clone(), fs::read(path)?));
        }
        files.sort();
        Ok(files)
    };
    let before = files()?;
    // Without the trap the signal would end the process.
    let limited = ["sh", "-c", "trap '' XFSZ; ulimit -f 64; exec \"$@\"", "sh"];
    let output = child("training::saver", &limited, dir.path())?.arg("--nocapture").output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    for file in [STATE, "adapter_model.safetensors"] {
        let named = |line: &str| line.contains(file) && line.contains("File too large");
        assert!(errors.lines().any(named), "{file}: {errors}");
    }
    assert!(files()? == before, "the last files are as they were, without another beside them");
    assert_eq!(Run::resume(1, dir.path())?.opt.steps(), 3);
    Ok(())
}
