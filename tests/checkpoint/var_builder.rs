//! The `VarBuilder` that reads one tensor at a time.

use crate::common::{bits, rnd};
use crate::shards::{index, shard, INDEX};
use crate::{fails, CPU};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use lora::safetensors_var_builder;
use loralib as lora;
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

fn open(path: impl AsRef<Path>) -> lora::Result<VarBuilder<'static>> {
    safetensors_var_builder(path, DType::F32, &CPU)
}

#[test]
fn values_are_those_of_candle_s_mapped_files() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    shard(dir.path(), "1.safetensors", &["a", "b.weight"])?;
    shard(dir.path(), "2.safetensors", &["c.weight.long"])?;
    let map = [("a", "1.safetensors"), ("b.weight", "1.safetensors")];
    index(dir.path(), &[map[0], map[1], ("c.weight.long", "2.safetensors")])?;
    let half = tempfile::tempdir()?;
    let tensor = rnd(5, &[2, 3], DType::BF16)?.to_device(&CPU)?;
    let tensors = HashMap::from([("a".to_owned(), tensor)]);
    candle_core::safetensors::save(&tensors, half.path().join("model.safetensors"))?;

    let shards = vec![dir.path().join("1.safetensors"), dir.path().join("2.safetensors")];
    let all = ["a", "b.weight", "c.weight.long"];
    let one = half.path().join("model.safetensors");
    for (path, files, names) in [
        (dir.path().to_owned(), shards.clone(), &all[..]),
        (dir.path().join(INDEX), shards.clone(), &all[..]),
        (shards[1].clone(), shards[1..].to_vec(), &all[2..]),
        (half.path().to_owned(), vec![one.clone()], &all[..1]),
        (one.clone(), vec![one.clone()], &all[..1]),
    ] {
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let vb = safetensors_var_builder(&path, dtype, &CPU)?;
            // SAFETY: nobody writes to the files of this test meanwhile.
            let mapped = unsafe { VarBuilder::from_mmaped_safetensors(&files, dtype, &CPU)? };
            for name in names {
                let (tensor, expected) = (vb.get((2, 3), name)?, mapped.get((2, 3), name)?);
                assert_eq!(tensor.dtype(), dtype);
                assert_eq!(bits(&tensor)?, bits(&expected)?, "{name} of {path:?}");
                assert_eq!(bits(&vb.get_unchecked(name)?)?, bits(&expected)?, "{name}");
                assert!(vb.contains_tensor(name) && !vb.contains_tensor("d"));
            }
        }
    }
    Ok(())
}

#[test]
fn what_a_layer_cannot_have_is_an_error_with_file_and_tensor() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    shard(dir.path(), "1.safetensors", &["a"])?;
    let nan = Tensor::full(f32::NAN, (2, 3), &CPU)?;
    candle_core::safetensors::save(
        &HashMap::from([("b".to_owned(), nan)]),
        dir.path().join("2.safetensors"),
    )?;
    index(dir.path(), &[("a", "1.safetensors"), ("b", "2.safetensors")])?;
    let vb = open(dir.path())?;
    let get = |shape: (usize, usize), name: &str| Ok(vb.get(shape, name)?);
    fails(get((3, 2), "a"), &["1.safetensors", "\"a\"", "[2, 3]", "[3, 2]"]);
    fails(get((2, 3), "c"), &[&dir.path().display().to_string(), "\"c\"", "missing"]);
    fails(get((2, 3), "b"), &["2.safetensors", "\"b\"", "not finite"]);
    File::options().write(true).open(dir.path().join("1.safetensors"))?.set_len(20)?;
    fails(get((2, 3), "a"), &["1.safetensors", "\"a\"", "failed to fill"]);
    Ok(())
}

#[test]
fn files_are_checked_when_they_are_opened() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let opened = |path: &Path| open(path).map(drop);
    fails(opened(dir.path()), &["the folder has none of"]);
    shard(dir.path(), "1.safetensors", &["a"])?;
    index(dir.path(), &[("a", "1.safetensors"), ("b", "2.safetensors")])?;
    fails(opened(dir.path()), &["2.safetensors", "No such file"]);
    shard(dir.path(), "2.safetensors", &["a", "b"])?;
    fails(opened(dir.path()), &["2.safetensors", "\"a\"", "another shard"]);
    let whole = fs::read(dir.path().join("1.safetensors"))?;
    fs::write(dir.path().join("1.safetensors"), &whole[..whole.len() - 1])?;
    fails(opened(dir.path()), &["1.safetensors", "bytes"]);
    Ok(())
}
