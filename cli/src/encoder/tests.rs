//! The encoders against transformers: small models of each family, written by `cli/tests/models/models.py`.

use super::{Base, Model, Task};
use crate::Result;
use candle_core::{Device, Tensor};
use lora::adapter::Targets;
use lora::train::Pooling;
use lora::utils::StateDict;
use lora::{Adapter, LoraConfig};
use loralib as lora;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

const FAMILIES: [&str; 3] = ["bert", "roberta", "distilbert"];

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/models", name].iter().collect()
}

/// A folder with the model's files, and a tokenizer of two words.
fn folder(name: &str) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture(name).join(file), dir.path().join(file))?;
    }
    let model = json!({"type": "WordLevel", "vocab": {"?": 0, "a": 3}, "unk_token": "?"});
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "model": model});
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string())?;
    Ok(dir)
}

fn labels(count: usize) -> Task {
    Task::Classify((0..count).map(|i| i.to_string()).collect())
}

fn model(path: &Path, task: &Task) -> Result<(Model, Adapter)> {
    let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).seed(1);
    let adapter = adapter.targets(Targets::all_linear());
    Base::read(path, 64, &Device::Cpu)?.model(task, adapter)
}

/// Of two texts in one row: their outputs, and what transformers has for each by this name.
fn outputs(name: &str, expected: &str, model: &Model) -> Result<(Tensor, Tensor)> {
    let all =
        candle_core::safetensors::load(fixture(name).join("expected.safetensors"), &Device::Cpu)?;
    let of = |what: &str| [9, 5].map(|n| all[&format!("{what}.{n}")].clone());
    let ids = Tensor::cat(&of("ids"), 0)?.to_dtype(candle_core::DType::U32)?.unsqueeze(0)?;
    let outputs = model.forward(&ids, &[9, 5], |_, x, layer| layer(x))?;
    Ok((outputs, Tensor::stack(&of(expected), 0)?))
}

fn apart(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    let largest = |t: &Tensor| t.abs()?.max_all()?.to_scalar::<f32>();
    Ok(largest(&(a - b)?)? / largest(b)?)
}

#[test]
fn scores_and_embeddings_are_those_of_transformers() -> Result<()> {
    for name in FAMILIES {
        let dir = folder(name)?;
        for (task, expected) in [(labels(3), "scores"), (Task::Embed(Pooling::Mean), "mean")] {
            let (model, adapter) = model(dir.path(), &task)?;
            assert!(!adapter.adapted().is_empty());
            let (outputs, expected) = outputs(name, expected, &model)?;
            let apart = apart(&outputs, &expected)?;
            assert!(apart < 1e-5, "{name}: {apart}");
        }
    }
    Ok(())
}

/// An encoder that was saved without a head, and one of an older file, whose norms have a gamma and a beta.
#[test]
fn files_without_the_prefix_and_with_older_names_are_the_same_model() -> Result<()> {
    for name in FAMILIES {
        let dir = folder(name)?;
        let file = dir.path().join("model.safetensors");
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
        let prefix = format!("{name}.");
        let without = |name: &String| name.strip_prefix(&prefix).unwrap_or(name).to_owned();
        let older = |name: &String| {
            let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
            name.replace("LayerNorm.bias", "LayerNorm.beta")
        };
        for rename in [&without as &dyn Fn(&String) -> String, &older] {
            let renamed: StateDict =
                tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect();
            candle_core::safetensors::save(&renamed.into_iter().collect(), &file)?;
            let (model, _) = model(dir.path(), &labels(3))?;
            let (outputs, expected) = outputs(name, "scores", &model)?;
            assert!(apart(&outputs, &expected)? < 1e-5, "{name}");
        }
    }
    Ok(())
}

#[test]
fn another_number_of_labels_gets_a_new_head_that_is_trained_and_saved() -> Result<()> {
    for name in FAMILIES {
        let dir = folder(name)?;
        let (model, adapter) = model(dir.path(), &labels(5))?;
        let (scores, _) = outputs(name, "scores", &model)?;
        assert_eq!(scores.dims(), [2, 5]);
        adapter.check()?;
        adapter.require_grads(&scores.sum_all()?.backward()?)?;
        let saved = adapter.state_dict()?;
        assert!(saved.keys().any(|name| name.starts_with("classifier.")), "{:?}", saved.keys());
    }
    Ok(())
}

/// The scores of a folder's own head have an order, which the labels of the data follow.
#[test]
fn labels_are_those_of_the_models_own_head_by_their_names() -> Result<()> {
    let dir = folder("bert")?;
    let path = dir.path().join("config.json");
    let own = |names: serde_json::Value| -> Result<Base> {
        let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        config["id2label"] = names;
        fs::write(&path, config.to_string())?;
        Base::read(dir.path(), 64, &Device::Cpu)
    };
    let order =
        |base: &Base, labels: [&str; 3]| match base.classify(labels.map(str::to_owned).into()) {
            Task::Classify(labels) => labels,
            Task::Embed(_) => vec![],
        };
    let is_own = |labels: [&str; 3]| -> Result<bool> {
        let task =
            Base::read(dir.path(), 64, &Device::Cpu)?.classify(labels.map(str::to_owned).into());
        let (outputs, expected) = outputs("bert", "scores", &model(dir.path(), &task)?.0)?;
        Ok(apart(&outputs, &expected)? < 1e-5)
    };
    let base = own(json!({"0": "neutral", "1": "bad", "2": "good"}))?;
    assert_eq!(order(&base, ["bad", "good", "neutral"]), ["neutral", "bad", "good"]);
    assert!(is_own(["bad", "good", "neutral"])?);
    assert_eq!(order(&base, ["bad", "best", "good"]), ["bad", "best", "good"]);
    assert!(!is_own(["bad", "best", "good"])?);
    assert!(!is_own(["0", "1", "2"])?);
    own(json!({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}))?;
    assert!(is_own(["0", "1", "2"])?);
    assert!(!is_own(["1", "2", "3"])?);
    Ok(())
}
