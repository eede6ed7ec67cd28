//! Merges from file to file.

use crate::common::bits;
use crate::{cfg, model, tensor, CPU};
use candle_core::{DType, Tensor};
use lora::adapter::AdapterConfig;
use lora::merge::{merge_files, merge_into};
use lora::LoraWeights;
use loralib as lora;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

fn write(path: &Path, tensors: &[(&str, &Tensor)]) {
    let all: HashMap<_, _> = tensors.iter().map(|(n, t)| (n.to_string(), (*t).clone())).collect();
    candle_core::safetensors::save(&all, path).unwrap();
}

#[test]
fn sharded_base_keeps_its_files() -> lora::Result<()> {
    let (base, adapter) = model(DType::BF16);
    let expected = merge_into(&base, &adapter)?;
    let dir = tempfile::tempdir()?;
    let from = dir.path().join("base");
    fs::create_dir(&from)?;
    let (mut map, mut size) = (serde_json::Map::new(), 0);
    let names: Vec<_> = base.keys().map(String::as_str).collect();
    for (i, names) in names.chunks(2).enumerate() {
        let shard = format!("model-{i}.safetensors");
        write(&from.join(&shard), &names.iter().map(|n| (*n, &base[*n])).collect::<Vec<_>>());
        for name in names {
            map.insert(name.to_string(), shard.clone().into());
            size += base[*name].elem_count() * base[*name].dtype().size_in_bytes();
        }
    }
    let index = from.join("model.safetensors.index.json");
    fs::write(&index, serde_json::json!({"metadata": {}, "weight_map": map}).to_string())?;
    for base in [from.clone(), index.clone()] {
        let out = tempfile::tempdir()?;
        let mut last = None;
        merge_files(&base, &adapter, out.path(), |p| last = Some(p))?;
        let last = last.unwrap();
        assert_eq!((last.done, last.total), (size as u64, size as u64));
        let whole = lora::read_state_dict(out.path(), &CPU)?.tensors;
        assert!(whole.keys().eq(expected.keys()));
        assert!(LoraWeights::new(cfg(), [].into()).is_err(), "an empty adapter");
        let mut seen = 0;
        for shard in ["model-0", "model-1", "model-2"] {
            let file = out.path().join(format!("{shard}.safetensors"));
            for (name, t) in lora::read_state_dict(file, &CPU)?.tensors {
                assert_eq!(bits(&t)?, bits(&expected[&name])?, "{name}");
                assert_eq!(t.dtype(), expected[&name].dtype());
                seen += 1;
            }
        }
        assert_eq!(seen, expected.len());
        assert_eq!(fs::read(out.path().join(index.file_name().unwrap()))?, fs::read(&index)?);
    }
    let whole = lora::read_state_dict(&from, &CPU)?.tensors;
    for (name, t) in merge_into(&whole, &adapter)? {
        assert_eq!(bits(&t)?, bits(&expected[&name])?, "{name}");
    }
    let before = fs::read(from.join("model-0.safetensors"))?;
    let own = merge_files(&from, &adapter, &from, |_| {}).unwrap_err().to_string();
    assert!(own.contains("own folder"), "{own}");
    assert_eq!(fs::read(from.join("model-0.safetensors"))?, before);
    let bad = index.with_file_name("bad.index.json");
    fs::write(&bad, r#"{"weight_map": {"a.weight": "../secret.safetensors"}}"#)?;
    let error = lora::read_state_dict(&bad, &CPU).unwrap_err().to_string();
    assert!(error.contains("secret"), "{error}");
    Ok(())
}

#[test]
fn single_file_keeps_its_header() -> lora::Result<()> {
    let (base, adapter) = model(DType::F32);
    let dir = tempfile::tempdir()?;
    let (from, to) = (dir.path().join("base.safetensors"), dir.path().join("out.safetensors"));
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    fs::write(&from, safetensors::serialize(&base, metadata).unwrap())?;
    merge_files(&from, &adapter, &to, |_| {})?;
    let (old, new) = (fs::read(&from)?, fs::read(&to)?);
    let start = 8 + u64::from_le_bytes(old[..8].try_into().unwrap()) as usize;
    assert_eq!(old[..start], new[..start]);
    assert_ne!(old[start..], new[start..]);
    let mut tensors = adapter.state_dict();
    tensors.insert("a.lora_A".into(), Tensor::full(f32::NAN, (2, 4), &CPU)?);
    let adapter = LoraWeights::new(cfg(), tensors)?;
    assert!(merge_files(&from, &adapter, &to, |_| {}).is_err());
    assert_eq!(fs::read(&to)?, new);
    assert_eq!(dir.path().read_dir()?.count(), 2, "no temporary file is left");
    Ok(())
}

/// The adapter of `model`, with a module that it trains whole.
fn with_module(module: &str, name: &str) -> lora::Result<LoraWeights> {
    let mut tensors = model(DType::F32).1.state_dict();
    tensors.insert(name.to_owned(), tensor(9, &[3, 4], DType::F32));
    let mut config = AdapterConfig::from(cfg());
    config.modules_to_save = vec![module.to_owned()];
    LoraWeights::new(config, tensors)
}

#[test]
fn a_module_that_the_base_lacks_is_added_and_told() -> lora::Result<()> {
    let (base, _) = model(DType::BF16);
    let adapter = with_module("classifier", "classifier.weight")?;
    let head = adapter.state_dict()["classifier.weight"].clone();
    let expected = merge_into(&base, &adapter)?;
    assert_eq!(bits(&expected["classifier.weight"])?, bits(&head)?);
    assert_eq!(expected.len(), base.len() + 1);
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("shards"))?;
    let all: Vec<_> = base.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write(&path("one.safetensors"), &all);
    let mut map = serde_json::Map::new();
    for (file, part) in [("1.safetensors", &all[..3]), ("2.safetensors", &all[3..])] {
        write(&path("shards").join(file), part);
        map.extend(part.iter().map(|(name, _)| (name.to_string(), file.into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 100}, "weight_map": map});
    fs::write(path("shards/model.safetensors.index.json"), index.to_string())?;
    for (from, to) in [("one.safetensors", "merged.safetensors"), ("shards", "merged")] {
        let mut last = None;
        let new = merge_files(path(from), &adapter, path(to), |p| last = Some(p))?;
        assert_eq!(
            (&new.added[..], &new.untied[..]),
            (&["classifier.weight".to_owned()][..], &[][..])
        );
        assert_eq!(last.map(|p| p.done), last.map(|p| p.total), "{from}");
        let merged = lora::read_state_dict(path(to), &CPU)?.tensors;
        assert!(merged.keys().eq(expected.keys()), "{from}");
        for (name, tensor) in merged {
            assert_eq!(bits(&tensor)?, bits(&expected[&name])?, "{from}: {name}");
        }
    }
    let index = fs::read_to_string(path("merged/model.safetensors.index.json"))?;
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["weight_map"]["classifier.weight"], "2.safetensors");
    assert_eq!(index["metadata"]["total_size"], 100 + 3 * 4 * 4);
    Ok(())
}

/// An adapter of a model with other paths adds nothing.
#[test]
fn what_is_no_new_module_is_refused() -> lora::Result<()> {
    let (base, _) = model(DType::F32);
    for (module, name) in [("other", "classifier.weight"), ("norm", "model.norm.weight")] {
        let error = merge_into(&base, &with_module(module, name)?).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("does not have it"), "{error}");
    }
    Ok(())
}
