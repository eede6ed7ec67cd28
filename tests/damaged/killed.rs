//! A writer that is killed at any moment leaves the old file or the new one, and a complete folder in
//! PEFT's format. A reader during a save finds the old files or the new ones.

use crate::{alone, Random, CPU};
use candle_core::Tensor;
use lora::formats::peft;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const FOLDER: &str = "LORALIB_TEST_WRITER_FOLDER";
const ROUND: &str = "LORALIB_TEST_WRITER_ROUND";

fn adapter(value: f32) -> StateDict {
    let full = |dims: [usize; 2]| Tensor::full(value, &dims[..], &CPU).unwrap();
    [("q.lora_A".to_owned(), full([2, 20_000])), ("q.lora_B".to_owned(), full([20_000, 2]))].into()
}

fn weights(value: f32, cfg: LoraConfig) -> LoraWeights {
    LoraWeights::new(cfg, adapter(value)).unwrap()
}

/// Not a test: the process that the next test starts and kills.
#[test]
fn writer() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let round: usize = std::env::var(ROUND).unwrap().parse().unwrap();
    for i in round * 1000 + 1.. {
        // Some saves change the configuration, others only the tensors.
        let cfg = LoraConfig { r: 2, lora_alpha: i as f64, ..Default::default() };
        let value = i as f32;
        match round % 3 {
            0 => {
                let path = folder.join("adapter.safetensors");
                lora::save_state_dict(&adapter(value), cfg, path).unwrap();
            }
            1 => peft::save(folder.join("peft"), &weights(value, cfg)).unwrap(),
            _ => {
                let cfg = LoraConfig { lora_alpha: 0., ..cfg };
                peft::save(folder.join("same"), &weights(value, cfg)).unwrap();
            }
        }
    }
}

/// The number of the save that wrote each file, which all of its values must agree on.
fn saved(folder: &Path) -> lora::Result<[f64; 3]> {
    let file = lora::read_state_dict(folder.join("adapter.safetensors"), &CPU)?;
    let peft = peft::load(folder.join("peft"), &CPU)?;
    let same = peft::load(folder.join("same"), &CPU)?;
    let all = |tensors: &StateDict| {
        let mut ends = vec![];
        for t in tensors.values() {
            let t = t.flatten_all()?;
            ends.extend([t.min(0)?.to_scalar::<f32>()?, t.max(0)?.to_scalar()?].map(f64::from));
        }
        assert!(ends.iter().all(|end| *end == ends[0]), "tensors of different saves: {ends:?}");
        Ok::<_, lora::Error>(ends[0])
    };
    let saved = [all(&file.tensors)?, all(&peft.state_dict())?, all(&same.state_dict())?];
    let alpha = file.config.unwrap().lora.lora_alpha;
    assert_eq!(saved[0], alpha, "tensors and options of different saves");
    assert_eq!(saved[1], peft.config().lora.lora_alpha, "tensors and options of different saves");
    Ok(saved)
}

#[test]
fn killed_writer_leaves_complete_files() -> lora::Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let cfg = LoraConfig { r: 2, lora_alpha: 0., ..Default::default() };
    lora::save_state_dict(&adapter(0.), cfg, dir.path().join("adapter.safetensors"))?;
    for folder in ["peft", "same"] {
        peft::save(dir.path().join(folder), &weights(0., cfg))?;
    }
    let (mut r, mut finished, mut between) = (Random(7), BTreeSet::new(), 0);
    for round in 0..300 {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["killed::writer", "--exact", "--test-threads=1"])
            .env(FOLDER, dir.path())
            .env(ROUND, round.to_string())
            .stdout(Stdio::null())
            .spawn()?;
        let end = Instant::now() + Duration::from_micros(2_000 + r.below(40_000) as u64);
        while Instant::now() < end {
            saved(dir.path())?;
        }
        child.kill()?;
        child.wait()?;
        finished.extend(saved(dir.path())?.map(|number| number as usize / 1000));
        between += usize::from(!dir.path().join("peft/adapter_config.json").exists());
    }
    let left = fs::read_dir(dir.path())?.count() - 3;
    println!(
        "300 kills: {} writers completed a save, the others left {left} temporary files, {between} \
         folders had only their tensors",
        finished.len()
    );
    assert!(finished.len() > 30, "{}", finished.len());
    Ok(())
}

/// A pipe in place of the configuration blocks the reader until the writer is done.
#[cfg(unix)]
#[test]
fn reader_during_a_save_reads_again() -> lora::Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let [folder, new] = ["folder", "new"].map(|name| dir.path().join(name));
    let cfg = |lora_alpha| LoraConfig { r: 2, lora_alpha, ..Default::default() };
    peft::save(&folder, &weights(1., cfg(1.)))?;
    peft::save(&new, &weights(2., cfg(2.)))?;
    let config = "adapter_config.json";
    let old = fs::read(folder.join(config))?;
    fs::remove_file(folder.join(config))?;
    assert!(Command::new("mkfifo").arg(folder.join(config)).status()?.success());
    let writer = std::thread::spawn({
        let (folder, new) = (folder.clone(), new.clone());
        move || -> std::io::Result<()> {
            let mut pipe = fs::OpenOptions::new().write(true).open(folder.join(config))?;
            for file in ["adapter_model.safetensors", config] {
                fs::rename(new.join(file), folder.join(file))?;
            }
            std::io::Write::write_all(&mut pipe, &old)
        }
    });
    let weights = peft::load(&folder, &CPU)?;
    writer.join().unwrap()?;
    assert_eq!(weights.config().lora.lora_alpha, 2.);
    assert_eq!(weights.state_dict()["q.lora_A"].get(0)?.get(0)?.to_scalar::<f32>()?, 2.);
    Ok(())
}
