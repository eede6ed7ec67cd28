//! Folders of an adapter that are written over.

use candle_core::{DType, Device, Tensor};
use lora::adapter::AdapterConfig;
use lora::formats::{mlx, peft};
use lora::layers::LayerKind;
use lora::{LoraConfig, LoraWeights, Result};
use loralib as lora;
use std::fs;
use std::path::Path;

const CPU: Device = Device::Cpu;

/// An adapter whose factors have the value of its alpha.
fn weights(alpha: f64) -> LoraWeights {
    let of = |name: &str, dims: &[usize]| {
        let tensor = Tensor::full(alpha as f32, dims, &CPU).unwrap();
        (format!("q_proj.{name}"), tensor.to_dtype(DType::F32).unwrap())
    };
    let cfg = LoraConfig { r: 2, lora_alpha: alpha, ..Default::default() };
    let config = AdapterConfig::from(cfg).with_layer("q_proj", LayerKind::Linear);
    LoraWeights::new(config, [of("lora_A", &[2, 4]), of("lora_B", &[4, 2])].into()).unwrap()
}

fn is_of(read: &LoraWeights, alpha: f64) -> bool {
    let layer = &read.state_dict()["q_proj.lora_A"];
    let value = f64::from(layer.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]);
    let own = read.lora_config("q_proj").map(|cfg| cfg.scaling());
    value == alpha && own == Some(alpha / 2.)
}

type Save = fn(&Path, &LoraWeights) -> Result<()>;
type Load = fn(&Path) -> Result<LoraWeights>;

const FORMATS: [(&str, Save, Load); 2] = [
    ("peft", |dir, weights| peft::save(dir, weights), |dir| peft::load(dir, &CPU)),
    ("mlx", |dir, weights| mlx::save(dir, weights), |dir| mlx::load(dir, &CPU)),
];

/// As in Hugging Face's cache.
#[cfg(unix)]
#[test]
fn a_linked_configuration_is_replaced_and_stays_linked() -> Result<()> {
    for (format, save, load) in FORMATS {
        let (dir, blobs) = (tempfile::tempdir()?, tempfile::tempdir()?);
        save(dir.path(), &weights(4.))?;
        for file in fs::read_dir(dir.path())? {
            let (path, name) = (file.as_ref().unwrap().path(), file.as_ref().unwrap().file_name());
            let blob = blobs.path().join(name);
            fs::rename(&path, &blob)?;
            std::os::unix::fs::symlink(&blob, &path)?;
        }
        assert!(is_of(&load(dir.path())?, 4.), "{format}");
        save(dir.path(), &weights(6.))?;
        assert!(is_of(&load(dir.path())?, 6.), "{format}");
        let config = dir.path().join("adapter_config.json");
        assert!(config.exists() && config.symlink_metadata()?.is_symlink(), "{format}");
    }
    Ok(())
}

#[test]
fn two_writers_of_a_folder_leave_the_files_of_one() -> Result<()> {
    for (format, save, load) in FORMATS {
        let dir = tempfile::tempdir()?;
        for round in 0..60 {
            std::thread::scope(|scope| {
                let writer = |alpha| {
                    let path = dir.path();
                    move || save(path, &weights(alpha))
                };
                let both = [writer(4.), writer(6.)].map(|write| scope.spawn(write));
                both.into_iter().try_for_each(|thread| thread.join().unwrap())
            })?;
            let read = load(dir.path())?;
            assert!(is_of(&read, 4.) || is_of(&read, 6.), "{format}, round {round}");
            // As Python reads it: the two files alone.
            let json = fs::read_to_string(dir.path().join("adapter_config.json"))?;
            let told = |alpha: f64| {
                json.contains(&format!("\"lora_alpha\": {alpha}"))
                    || json.contains(&format!("\"scale\": {:?}", alpha / 2.))
            };
            assert!(
                told(if is_of(&read, 4.) { 4. } else { 6. }),
                "{format}, round {round}: {json}"
            );
        }
    }
    Ok(())
}
