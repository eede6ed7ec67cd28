//! Checkpoints of several files: all shards of a folder or of an index.

use crate::common::{bits, rnd};
use crate::{fails, CPU};
use candle_core::DType;
use lora::utils::StateDict;
use loralib as lora;
use std::fs;
use std::path::Path;

pub const INDEX: &str = "model.safetensors.index.json";

pub fn shard(folder: &Path, file: &str, names: &[&str]) -> lora::Result<StateDict> {
    let tensor = |(seed, name): (usize, &&str)| {
        let tensor = rnd(seed as u64 + name.len() as u64, &[2, 3], DType::F32)?.to_device(&CPU)?;
        Ok((name.to_string(), tensor))
    };
    let tensors: StateDict = names.iter().enumerate().map(tensor).collect::<lora::Result<_>>()?;
    candle_core::safetensors::save(&tensors.clone().into_iter().collect(), folder.join(file))?;
    Ok(tensors)
}

pub fn index(folder: &Path, map: &[(&str, &str)]) -> lora::Result<()> {
    let map: serde_json::Map<_, _> =
        map.iter().map(|(name, file)| (name.to_string(), (*file).into())).collect();
    Ok(fs::write(folder.join(INDEX), serde_json::json!({ "weight_map": map }).to_string())?)
}

#[test]
fn all_shards_are_read() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut all = shard(dir.path(), "1.safetensors", &["a", "b.weight"])?;
    all.extend(shard(dir.path(), "2.safetensors", &["c.weight.long"])?);
    // A file that the index does not name is not read.
    shard(dir.path(), "3.safetensors", &["d"])?;
    let map = [("a", "1.safetensors"), ("b.weight", "1.safetensors")];
    index(dir.path(), &[map[0], map[1], ("c.weight.long", "2.safetensors")])?;
    for path in [dir.path().to_owned(), dir.path().join(INDEX)] {
        let read = lora::read_state_dict(path, &CPU)?.tensors;
        assert!(read.keys().eq(all.keys()), "{:?}", read.keys());
        for (name, tensor) in &read {
            assert_eq!(bits(tensor)?, bits(&all[name])?, "{name}");
        }
    }
    Ok(())
}

#[test]
fn folder_with_one_file_is_read() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    fails(lora::read_state_dict(dir.path(), &CPU), &["the folder has none of"]);
    shard(dir.path(), "model.safetensors", &["a"])?;
    assert_eq!(lora::read_state_dict(dir.path(), &CPU)?.tensors.len(), 1);
    // An index is preferred to a single file.
    shard(dir.path(), "1.safetensors", &["a", "b"])?;
    index(dir.path(), &[("a", "1.safetensors")])?;
    assert_eq!(lora::read_state_dict(dir.path(), &CPU)?.tensors.len(), 2);
    Ok(())
}

#[test]
fn errors_name_the_shard() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    shard(dir.path(), "1.safetensors", &["a"])?;
    index(dir.path(), &[("a", "1.safetensors"), ("b", "2.safetensors")])?;
    fails(lora::read_state_dict(dir.path(), &CPU), &["2.safetensors", "No such file"]);
    shard(dir.path(), "2.safetensors", &["a", "b"])?;
    fails(lora::read_state_dict(dir.path(), &CPU), &["2.safetensors", "\"a\"", "another shard"]);
    fs::write(dir.path().join(INDEX), "{}")?;
    fails(lora::read_state_dict(dir.path(), &CPU), &[INDEX, "no weight_map"]);
    index(dir.path(), &[("a", "../1.safetensors")])?;
    fails(lora::read_state_dict(dir.path(), &CPU), &[INDEX, "../1.safetensors"]);
    Ok(())
}
