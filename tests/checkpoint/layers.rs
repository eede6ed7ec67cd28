//! The kinds, ranks and alphas of single layers in a checkpoint.

use crate::common::{rnd, CFG};
use crate::{fails, CPU};
use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use lora::adapter::{AdapterConfig, LayerConfig};
use lora::layers::LayerKind;
use lora::utils::{Checkpoint, StateDict};
use lora::{Bias, LoraConfig, LoraWeights, Strict};
use loralib as lora;
use std::path::{Path, PathBuf};

/// `q` with the options of `CFG`, `qkv` with a rank and an alpha of its own.
fn config() -> AdapterConfig {
    let mut config = AdapterConfig::from(CFG)
        .with_layer("q", LayerKind::Linear)
        .with_layer("qkv", LayerKind::MergedLinear(vec![true, false, true]));
    let own = config.layers.get_mut("qkv").unwrap();
    (own.r, own.lora_alpha) = (Some(3), Some(6.));
    config
}

fn state() -> lora::Result<StateDict> {
    let shapes = [
        ("h.q.lora_A", [2, 4]),
        ("h.q.lora_B", [5, 2]),
        ("h.qkv.lora_A", [6, 4]),
        ("h.qkv.lora_B", [6, 3]),
    ];
    let tensor = |dims: &[usize]| rnd(1, dims, DType::F32)?.to_device(&CPU);
    shapes.into_iter().map(|(name, dims)| Ok((name.to_owned(), tensor(&dims)?))).collect()
}

fn variables(state: &StateDict) -> lora::Result<VarMap> {
    let vars = VarMap::new();
    for (name, tensor) in state {
        let zeros = Var::from_tensor(&tensor.zeros_like()?)?;
        vars.data().lock().unwrap().insert(name.clone(), zeros);
    }
    Ok(vars)
}

fn saved(folder: &Path, config: impl Into<AdapterConfig>) -> lora::Result<PathBuf> {
    let path = folder.join("adapter.safetensors");
    lora::save_state_dict(&state()?, config, &path)?;
    Ok(path)
}

#[test]
fn options_of_layers_round_trip() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let mut config = config().with_trainable(Bias::LoraOnly.and("head"))?;
    config.layers.get_mut("q").unwrap().fan_in_fan_out = Some(true);
    let path = saved(folder.path(), &config)?;
    let Checkpoint { config: read, tensors } = lora::read_state_dict(&path, &CPU)?;
    let read = read.expect("a configuration");
    for path in ["h.q", "h.qkv"] {
        assert_eq!(read.lora_config(path), config.lora_config(path));
        assert_eq!(read.kind(path), config.kind(path));
    }
    // Only the layers differ: they have an entry by their whole path.
    assert_eq!(AdapterConfig { layers: config.layers.clone(), ..read.clone() }, config);
    assert_eq!(read, LoraWeights::new(&config, state()?)?.config());
    assert!(tensors.keys().eq(state()?.keys()));
    // What was read is saved as the same bytes.
    let again = folder.path().join("again.safetensors");
    lora::save_state_dict(&tensors, read, &again)?;
    assert_eq!(std::fs::read(again)?, std::fs::read(path)?);
    Ok(())
}

#[test]
fn load_compares_the_options_of_each_layer() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = saved(folder.path(), config())?;
    let vars = variables(&state()?)?;
    let load = |config: &AdapterConfig| lora::load_checkpoint(&path, &vars, config, Strict::Yes);
    let refused = |change: &dyn Fn(&mut LayerConfig), path: &str, expected: [&str; 3]| {
        let mut other = config();
        change(other.layers.get_mut(path).unwrap());
        let lora::Error::File { error, .. } = load(&other).unwrap_err() else { panic!("no path") };
        let lora::Error::Config { layer, option, saved, model } = *error else { panic!("{error}") };
        assert_eq!(layer, Some(format!("h.{path}")));
        assert_eq!([option, &saved, &model], expected);
    };
    refused(&|own| own.r = Some(1), "qkv", ["r", "3", "1"]);
    refused(&|own| own.r = None, "qkv", ["r", "3", "2"]);
    refused(&|own| own.r = Some(1), "q", ["r", "2", "1"]);
    refused(&|own| own.lora_alpha = None, "qkv", ["lora_alpha", "6", "3"]);
    refused(&|own| own.lora_alpha = Some(6.), "q", ["lora_alpha", "3", "6"]);
    let embedding = |own: &mut LayerConfig| own.kind = Some(LayerKind::Embedding);
    refused(&embedding, "q", ["kind", "Linear", "Embedding"]);
    fails(load(&CFG.into()), &["h.qkv", "r = 3", "has 2", "adapter.safetensors"]);
    assert!(vars.all_vars().iter().all(|var| is_zero(var)), "an error sets nothing");

    assert_eq!(load(&config())?.loaded.len(), 4);
    assert!(!vars.all_vars().iter().any(|var| is_zero(var)));
    // A kind that the model does not declare is not compared.
    let mut undeclared = config();
    undeclared.layers.get_mut("q").unwrap().kind = None;
    assert_eq!(load(&undeclared)?.loaded.len(), 4);
    Ok(())
}

fn is_zero(tensor: &Tensor) -> bool {
    tensor.abs().and_then(|t| t.sum_all()?.to_scalar::<f32>()).unwrap() == 0.
}

#[test]
fn files_without_layers_load() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("plain.safetensors");
    let state: StateDict = state()?.into_iter().filter(|(name, _)| name.contains(".q.")).collect();
    lora::save_state_dict(&state, CFG, &path)?;
    let bytes = std::fs::read(&path)?;
    assert!(!String::from_utf8_lossy(&bytes).contains("layers"));
    let vars = variables(&state)?;
    for model in [CFG.into(), AdapterConfig::from(CFG).with_layer("q", LayerKind::Linear)] {
        let report = lora::load_checkpoint(&path, &vars, model, Strict::Yes)?;
        assert_eq!(report.loaded, ["h.q.lora_A", "h.q.lora_B"]);
    }
    let alpha = LoraConfig { lora_alpha: 4., ..CFG };
    let named = ["h.q", "lora_alpha = 3", "has 4"];
    fails(lora::load_checkpoint(&path, &vars, alpha, Strict::Yes), &named);
    assert_eq!(lora::read_state_dict(&path, &CPU)?.config, Some(CFG.into()));
    Ok(())
}

#[test]
fn options_that_do_not_fit_the_tensors_are_not_saved() -> lora::Result<()> {
    let folder = tempfile::tempdir()?;
    let refused = |change: &dyn Fn(&mut AdapterConfig), words: &[&str]| {
        let mut config = config();
        change(&mut config);
        fails(saved(folder.path(), config), words);
    };
    let own = |config: &mut AdapterConfig, r| config.layers.get_mut("qkv").unwrap().r = Some(r);
    refused(&|c| own(c, 4), &["h.qkv.lora_A", "rank is 6", "r = 4"]);
    refused(&|c| own(c, 0), &["h.qkv.lora_A", "r = 0"]);
    let nan = |c: &mut AdapterConfig| c.layers.get_mut("q").unwrap().lora_alpha = Some(f64::NAN);
    refused(&nan, &["h.q.lora_A", "lora_alpha is NaN"]);
    refused(&|c| *c = c.clone().with_layer("k", LayerKind::Linear), &["k.lora_A", "adapter.saf"]);
    assert_eq!(folder.path().read_dir()?.count(), 0);
    Ok(())
}
