//! Every reader over the files of every format: what a message says to read a file by does read it.

use crate::{failed, fixture, zeros, CPU};
use lora::formats::{diffusers, kohya, mlx, peft};
use lora::{Adapter, LoraWeights, Result};
use loralib as lora;
use std::fs;
use std::path::{Path, PathBuf};

type Read = fn(&Path) -> Result<()>;

/// The readers by their names in messages.
const READERS: [(&str, Read); 5] = [
    ("formats::peft::load", |path| peft::load(path, &CPU).map(drop)),
    ("formats::diffusers::load", |path| diffusers::load(path, &CPU).map(drop)),
    ("formats::kohya::load", |path| kohya::load(path, &CPU).map(drop)),
    ("formats::mlx::load", |path| mlx::load(path, &CPU).map(drop)),
    ("Adapter::load", |path| Adapter::load(path, &CPU).map(drop)),
];

/// A file or a folder of each format, and files that no reader knows.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let folder =
        |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let mut files = vec![folder("peft/linear"), fixture("mlx")];
    for format in ["diffusers", "kohya"] {
        for entry in fs::read_dir(fixture(format))? {
            let path = entry?.path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.ends_with(".safetensors") && !name.starts_with("model") {
                files.push(path);
            }
        }
    }
    let own = dir.join("own.safetensors");
    Adapter::load(folder("peft/linear"), &CPU)?.save(&own)?;
    files.push(own);
    for (i, names) in [
        ["diffusion_model.a.q.lora_down.weight", "diffusion_model.a.q.lora_up.weight"],
        ["unet.a.q.lora_down.weight", "unet.a.q.lora_up.weight"],
        ["lora_unet_a_q.hada_w1_a", "lora_unet_a_q.hada_w1_b"],
        ["lora_unet_a_q.lokr_w1", "lora_unet_a_q.lokr_w2"],
        ["lora_unet_a_q.lora_mid.weight", "lora_unet_a_q.lora_down.weight"],
        ["base_model.model.q.ia3_l", "base_model.model.k.ia3_l"],
        ["a.q.lora_a", "a.q.lora_b"],
        ["a.q.weight", "a.k.weight"],
        ["base_model.model.a.q.lora_A.weight", "base_model.model.a.q.lora_B.weight"],
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.join(format!("{i}.safetensors"));
        let tensors = names.map(|name| (name.to_owned(), zeros(&[2, 2]).unwrap()));
        candle_core::safetensors::save(&tensors.into(), &path)?;
        files.push(path);
    }
    for (name, bytes) in
        [("model.gguf", &b"GGUF\x03\0\0\0\0\0\0\0"[..]), ("a.json", b"{\"r\": 8, \"x\": 1}")]
    {
        fs::write(dir.join(name), bytes)?;
        files.push(dir.join(name));
    }
    Ok(files)
}

#[test]
fn the_reader_that_a_message_names_reads_the_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut led = 0;
    for path in files(dir.path())? {
        for (name, read) in READERS {
            let Err(error) = read(&path) else { continue };
            let error = error.to_string();
            for (other, read) in
                READERS.into_iter().filter(|(other, _)| error.contains(&format!("`{other}`")))
            {
                // A message that also says what to rename first leads somewhere after that.
                if error.contains("rename") || error.contains("folder by") && path.is_file() {
                    continue;
                }
                assert_ne!(other, name, "{error}");
                led += 1;
                // "Adapter::load or formats::peft::load" are of one folder.
                if let Err(failed) = read(&path) {
                    panic!("{name} of {}: {error}\n{other}: {failed}", path.display())
                }
            }
        }
    }
    assert!(led >= 5, "{led} messages name a reader");
    Ok(())
}

#[test]
fn files_of_other_kinds_and_methods_are_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let says = |name: &str, words: &[&str]| {
        let path = dir.path().join(name);
        let errors = [
            failed(name, kohya::load(&path, &CPU)),
            failed(name, diffusers::load(&path, &CPU)),
            failed(name, Adapter::load(&path, &CPU)),
        ];
        for error in errors {
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    };
    files(dir.path())?;
    says("model.gguf", &["model.gguf", "GGUF file", "load_gguf"]);
    says("a.json", &["a.json", "JSON file"]);
    let path = dir.path().join("ia3.safetensors");
    let header = br#"{"lora_unet_q.on_input":{"dtype":"BOOL","shape":[],"data_offsets":[0,1]}}"#;
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header, &[1]].concat())?;
    says("ia3.safetensors", &["on_input", "(IA)\u{b3}"]);
    let folder = dir.path().join("mlx");
    fs::create_dir(&folder)?;
    fs::copy(fixture("mlx").join("adapters.safetensors"), folder.join("adapters.safetensors"))?;
    let config = |parameters: &str| -> Result<String> {
        let json = format!(r#"{{"lora_parameters": {{"rank": 3, {parameters}}}}}"#);
        fs::write(folder.join("adapter_config.json"), json)?;
        Ok(failed::<LoraWeights>("adapter_config.json", mlx::load(&folder, &CPU)))
    };
    let error = config(r#""alpha": 16"#)?;
    assert!(error.contains("alpha = 16") && error.contains("`scale`"), "{error}");
    assert!(config(r#""dropout": 0.0"#)?.contains("no scale"));
    Ok(())
}
