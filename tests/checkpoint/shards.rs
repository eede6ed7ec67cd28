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

/// A part of a model would be read without an error.
#[test]
fn a_tensor_of_the_index_that_no_shard_has_is_an_error() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    shard(dir.path(), "1.safetensors", &["a.weight"])?;
    index(dir.path(), &[("a.weight", "1.safetensors"), ("b.weight", "1.safetensors")])?;
    let named = ["b.weight", INDEX];
    let says = |error: lora::Error| {
        let error = error.to_string();
        assert!(named.iter().all(|part| error.contains(part)), "{error}");
    };
    says(lora::read_state_dict(dir.path(), &CPU).unwrap_err());
    says(lora::safetensors_var_builder(dir.path(), DType::F32, &CPU).err().unwrap());
    says(lora::base::half_var_builder(dir.path(), DType::F32, &CPU).err().unwrap());
    let cfg = lora::LoraConfig { r: 1, ..Default::default() };
    let pair = [("a.lora_A", [1, 3]), ("a.lora_B", [2, 1])];
    let pair = pair.map(|(name, dims)| Ok((name.to_owned(), rnd(1, &dims, DType::F32)?)));
    let pair = pair.into_iter().collect::<lora::Result<StateDict>>()?;
    let weights = lora::LoraWeights::new(cfg, pair)?;
    let out = dir.path().join("out");
    says(lora::merge::merge_files(dir.path(), &weights, &out, |_| {}).unwrap_err());
    assert!(!out.exists());
    Ok(())
}

#[test]
fn weights_in_fp8_are_multiplied_by_their_scales() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    let values = rnd(1, &[4, 6], DType::F32)?.to_device(&CPU)?.to_dtype(DType::F8E4M3)?;
    let wide = values.to_dtype(DType::F32)?;
    let scale = |dims: &[usize]| -> lora::Result<_> {
        Ok((rnd(2, dims, DType::F32)?.to_device(&CPU)?.abs()? / 500.)?)
    };
    let names = ["weight_scale", "weight_scale_inv", "scale_weight"];
    for (name, dims) in
        [(names[0], &[][..]), (names[0], &[4, 1]), (names[1], &[1, 1]), (names[2], &[1])]
    {
        let scale = scale(dims)?;
        let tensors = [("q.weight", values.clone()), (&format!("q.{name}"), scale.clone())];
        candle_core::safetensors::save(&tensors.map(|(n, t)| (n.to_owned(), t)).into(), &path)?;
        let expected = match dims.len() {
            2 => wide.broadcast_mul(&scale)?,
            _ => wide.broadcast_mul(&scale.reshape(())?)?,
        };
        for dtype in [DType::F32, DType::BF16] {
            for vb in [
                lora::safetensors_var_builder(&path, dtype, &CPU)?,
                lora::base::half_var_builder(&path, dtype, &CPU)?,
                lora::Adapter::new(lora::LoraConfig::default())
                    .var_builder(lora::safetensors_var_builder(&path, dtype, &CPU)?),
            ] {
                let read = vb.get((4, 6), "q.weight")?;
                assert_eq!(bits(&read)?, bits(&expected.to_dtype(dtype)?)?, "{name} {dims:?}");
            }
        }
        // Another weight is as it is.
        let half = wide.to_dtype(DType::BF16)?;
        let tensors = [("q.weight", half.clone()), (&format!("q.{name}"), scale.clone())];
        let other = dir.path().join("half.safetensors");
        candle_core::safetensors::save(&tensors.map(|(n, t)| (n.to_owned(), t)).into(), &other)?;
        let read = lora::safetensors_var_builder(&other, DType::F32, &CPU)?;
        assert_eq!(bits(&read.get((4, 6), "q.weight")?)?, bits(&half.to_dtype(DType::F32)?)?);
        let vars = candle_nn::VarMap::new();
        let var = candle_core::Var::zeros((4, 6), DType::F32, &CPU)?;
        vars.data().lock().unwrap().insert("q.weight".to_owned(), var);
        let stored = lora::read_state_dict(&path, &CPU)?.tensors;
        let error = lora::load_state_dict(&vars, &stored, lora::utils::Strict::No).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        // A merged weight would need other scales.
        let pair = [("q.lora_A", [1, 6]), ("q.lora_B", [4, 1])];
        let pair = pair.map(|(name, dims)| Ok((name.to_owned(), rnd(1, &dims, DType::F32)?)));
        let pair = pair.into_iter().collect::<lora::Result<StateDict>>()?;
        let weights =
            lora::LoraWeights::new(lora::LoraConfig { r: 1, ..Default::default() }, pair)?;
        let base = lora::read_state_dict(&path, &CPU)?.tensors;
        let out = dir.path().join("out.safetensors");
        for error in [
            lora::merge::merge_into(&base, &weights).unwrap_err(),
            lora::merge::merge_files(&path, &weights, &out, |_| {}).unwrap_err(),
        ] {
            let error = error.to_string();
            assert!(error.contains("q.weight") && error.contains(name), "{error}");
        }
        let merged = lora::Adapter::from_weights(&weights)?
            .merged(lora::safetensors_var_builder(&path, DType::F32, &CPU)?)?
            .get((4, 6), "q.weight")?;
        let plain = [("q.weight".to_owned(), expected)].into();
        let plain = lora::merge::merge_into(&plain, &weights)?;
        assert_eq!(bits(&merged)?, bits(&plain["q.weight"])?);
    }
    Ok(())
}
