//! What is trained, saved and loaded; and files that are not what they should be.

mod common;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{bits, rnd, CFG};
use lora::{Bias, LoraConfig, LoraModule, StateDict, Strict};
use loralib as lora;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

const CPU: Device = Device::Cpu;

struct Model {
    q: lora::Linear,
    k: candle_nn::Linear,
    head: candle_nn::Linear,
}
lora::lora_module!(Model { q; k, head });

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            q: lora::linear(4, 4, CFG, vb.pp("q"))?,
            k: candle_nn::linear(4, 4, vb.pp("k"))?,
            head: candle_nn::linear(4, 3, vb.pp("classifier"))?,
        })
    }
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.k.forward(&self.q.forward(x)?)?)
    }
}

fn base(with_head: bool) -> Result<VarBuilder<'static>> {
    let mut tensors = HashMap::new();
    for (seed, name) in ["q", "k", "classifier"].into_iter().enumerate() {
        let out = if name == "classifier" { 3 } else { 4 };
        if name != "classifier" || with_head {
            tensors.insert(format!("{name}.weight"), rnd(seed as u64, &[out, 4], DType::F32)?);
            tensors.insert(format!("{name}.bias"), rnd(seed as u64 + 9, &[out], DType::F32)?);
        }
    }
    let tensors =
        tensors.into_iter().map(|(k, t)| Ok((k, t.to_device(&CPU)?))).collect::<Result<_>>()?;
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &CPU))
}

fn randomize(vars: &VarMap, seed: u64) -> Result<()> {
    let vars = vars.data().lock().unwrap();
    let mut names: Vec<_> = vars.keys().collect();
    names.sort();
    for (i, name) in names.into_iter().enumerate() {
        let value = rnd(seed + i as u64, vars[name].dims(), vars[name].dtype())?;
        vars[name].set(&value.to_device(&CPU)?)?;
    }
    Ok(())
}

fn names(vars: &VarMap) -> Vec<String> {
    let mut names: Vec<_> = vars.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    names
}

fn snapshot(vars: &VarMap) -> Vec<Vec<u64>> {
    let vars_by_name = vars.data().lock().unwrap();
    let mut names: Vec<_> = vars_by_name.keys().collect();
    names.sort();
    names.into_iter().map(|name| bits(&vars_by_name[name]).unwrap()).collect()
}

fn adapter(what: impl Into<lora::Trainable>) -> Result<(Model, VarMap)> {
    let adapter = VarMap::new();
    let model = Model::new(lora::var_builder(base(true)?, &adapter, what))?;
    Ok((model, adapter))
}

fn fails(result: lora::Result<impl std::fmt::Debug>, words: &[&str]) {
    let error = result.unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
}

#[test]
fn an_adapter_map_holds_what_is_trained_and_nothing_else() -> Result<()> {
    let lora = ["q.lora_A", "q.lora_B"];
    let cases: [(lora::Trainable, &[&str]); 4] = [
        (Bias::None.into(), &[]),
        (Bias::LoraOnly.into(), &["q.bias"]),
        (Bias::All.into(), &["classifier.bias", "k.bias", "q.bias"]),
        (Bias::None.and("classifier"), &["classifier.bias", "classifier.weight"]),
    ];
    for (what, others) in cases {
        let (_, vars) = adapter(what.clone())?;
        let mut expected: Vec<String> = lora.iter().chain(others).map(|s| s.to_string()).collect();
        expected.sort();
        assert_eq!(names(&vars), expected, "{what:?}");
        let saved = lora::lora_state_dict(&vars, what.clone())?;
        assert_eq!(saved.keys().cloned().collect::<Vec<_>>(), expected);
        let trained = lora::mark_only_lora_as_trainable(&vars, what.clone())?;
        for (var, (name, tensor)) in trained.iter().zip(&saved) {
            assert_eq!(bits(var)?, bits(tensor)?, "{name}");
        }
        // The same selection out of one map for all.
        let all = VarMap::new();
        Model::new(VarBuilder::from_varmap(&all, DType::F32, &CPU))?;
        let saved = lora::lora_state_dict(&all, what)?;
        assert_eq!(saved.keys().cloned().collect::<Vec<_>>(), expected);
    }
    Ok(())
}

#[test]
fn trained_biases_start_at_the_base_s_value_and_do_not_change_it() -> Result<()> {
    let base = base(true)?;
    let adapter = VarMap::new();
    Model::new(lora::var_builder(base.clone(), &adapter, Bias::All))?;
    let own = base.get(4, "q.bias")?;
    let before = bits(&own)?;
    let var = adapter.data().lock().unwrap()["q.bias"].clone();
    assert_eq!(bits(&var)?, before);
    var.set(&(own.ones_like()? * 7.)?)?;
    assert_eq!(bits(&base.get(4, "q.bias")?)?, before);
    Ok(())
}

#[test]
fn a_wrapped_layer_trains_the_bias_that_the_selection_names() -> Result<()> {
    for (what, trained) in [(Bias::None, false), (Bias::LoraOnly, true), (Bias::All, true)] {
        let adapter = VarMap::new();
        let vb = lora::var_builder(base(true)?, &adapter, what).pp("q");
        let layer = lora::Linear::new(candle_nn::linear(4, 4, vb.clone())?, CFG, vb)?;
        assert_eq!(names(&adapter).contains(&"q.bias".to_owned()), trained, "{what}");
        assert_eq!(layer.bias().unwrap().is_variable(), trained, "{what}");
    }
    Ok(())
}

#[test]
fn a_base_that_is_cut_out_of_a_var_map_does_not_follow_it() -> Result<()> {
    let vars = VarMap::new();
    Model::new(VarBuilder::from_varmap(&vars, DType::F32, &CPU))?;
    let adapter = VarMap::new();
    let base = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let model = Model::new(lora::var_builder(base, &adapter, Bias::None))?;
    assert_eq!(names(&adapter), ["q.lora_A", "q.lora_B"]);
    let x = rnd(1, &[2, 4], DType::F32)?.to_device(&CPU)?;
    let before = bits(&model.forward(&x)?)?;
    randomize(&vars, 3)?;
    assert_eq!(bits(&model.forward(&x)?)?, before);
    Ok(())
}

#[test]
fn a_missing_base_tensor_is_an_error_and_a_new_head_is_not() -> Result<()> {
    let vars = VarMap::new();
    let empty = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let error = Model::new(lora::var_builder(empty, &VarMap::new(), Bias::All)).err().unwrap();
    assert!(error.to_string().contains("\"q.weight\""), "{error}");
    assert!(names(&vars).is_empty(), "asking creates no variable in the base");
    let new =
        |what: lora::Trainable| Model::new(lora::var_builder(base(false)?, &VarMap::new(), what));
    assert!(new(Bias::None.into()).is_err());
    assert!(new(Bias::None.and("classifier")).is_ok());
    Ok(())
}

#[test]
fn an_empty_selection_is_an_error() -> Result<()> {
    let vars = VarMap::new();
    fails(lora::mark_only_lora_as_trainable(&vars, Bias::All), &["0 variables", "all"]);
    fails(lora::lora_state_dict(&vars, Bias::None), &["nothing"]);
    let (_, vars) = adapter(Bias::None)?;
    fails(lora::lora_state_dict(&vars, Bias::None.and("head")), &["\"head\""]);
    fails("some".parse::<Bias>(), &["\"some\"", "lora_only"]);
    assert_eq!("lora_only".parse::<Bias>()?, Bias::LoraOnly);
    Ok(())
}

#[test]
fn a_checkpoint_comes_back_in_a_fresh_model_bit_for_bit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    let x = rnd(1, &[2, 4], DType::F32)?.to_device(&CPU)?;
    let (mut model, vars) = adapter(Bias::LoraOnly)?;
    randomize(&vars, 5)?;
    model.eval()?;
    // Saved in evaluation, loaded in training: what is saved is never merged.
    lora::save_state_dict(&lora::lora_state_dict(&vars, Bias::LoraOnly)?, &CFG, &path)?;
    let (mut fresh, other) = adapter(Bias::LoraOnly)?;
    let report = lora::load_checkpoint(&path, &other, &CFG, Strict::Yes)?;
    assert_eq!(report.loaded, ["q.bias", "q.lora_A", "q.lora_B"]);
    assert!(report.missing.is_empty() && report.unexpected.is_empty());
    fresh.eval()?;
    assert_eq!(bits(&fresh.forward(&x)?)?, bits(&model.forward(&x)?)?);
    assert_eq!(lora::read_state_dict(&path, &CPU)?.config, Some(CFG));

    // Into one map for all too.
    let all = VarMap::new();
    Model::new(VarBuilder::from_varmap(&all, DType::F32, &CPU))?;
    let report = lora::load_checkpoint(&path, &all, &CFG, Strict::Yes)?;
    assert_eq!(report.loaded.len(), 3);

    // A state dict is a copy: it does not follow the variables.
    let saved = lora::lora_state_dict(&vars, Bias::None)?;
    let before = bits(&saved["q.lora_A"])?;
    randomize(&vars, 77)?;
    assert_eq!(bits(&saved["q.lora_A"])?, before);
    Ok(())
}

#[test]
fn equal_contents_give_equal_bytes_and_others_readers_take_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_, vars) = adapter(Bias::All)?;
    let state = lora::lora_state_dict(&vars, Bias::All)?;
    let mut seen = std::collections::HashSet::new();
    for i in 0..20 {
        let path = folder.path().join(format!("{i}.safetensors"));
        lora::save_state_dict(&state, &CFG, &path)?;
        seen.insert(fs::read(path)?);
    }
    assert_eq!(seen.len(), 1);
    let path = folder.path().join("0.safetensors");
    let read = candle_core::safetensors::load(&path, &CPU)?;
    assert_eq!(read.len(), state.len());
    // A file without our metadata has no configuration to compare, and loads.
    let plain = folder.path().join("plain.safetensors");
    candle_core::safetensors::save(&read, &plain)?;
    assert_eq!(lora::read_state_dict(&plain, &CPU)?.config, None);
    let report = lora::load_checkpoint(&plain, &vars, &CFG, Strict::Yes)?;
    assert_eq!(report.loaded.len(), state.len());
    Ok(())
}

#[test]
fn every_alpha_fits_the_file_that_it_was_saved_in() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.safetensors");
    let (_, vars) = adapter(Bias::None)?;
    let state = lora::lora_state_dict(&vars, Bias::None)?;
    for i in 1..200 {
        let lora_alpha = 16. * f64::from(i).sqrt();
        let cfg = LoraConfig { lora_alpha, lora_dropout: 1. / (i + 1) as f32, ..CFG };
        lora::save_state_dict(&state, &cfg, &path)?;
        assert_eq!(lora::read_state_dict(&path, &CPU)?.config, Some(cfg));
    }
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_save_keeps_modes_and_links_and_leaves_nothing_behind() -> Result<()> {
    use std::os::unix::fs::{symlink, PermissionsExt};
    let folder = tempfile::tempdir()?;
    let (_, vars) = adapter(Bias::None)?;
    let state = lora::lora_state_dict(&vars, Bias::None)?;
    let path = folder.path().join("a.safetensors");
    let mode = |path: &Path| fs::metadata(path).map(|m| m.permissions().mode() & 0o777);
    fs::write(folder.path().join("any"), "")?;
    lora::save_state_dict(&state, &CFG, &path)?;
    assert_eq!(mode(&path)?, mode(&folder.path().join("any"))?, "the mode of any new file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
    let link = folder.path().join("link");
    symlink("a.safetensors", &link)?;
    lora::save_state_dict(&state, &CFG, &link)?;
    assert_eq!(mode(&path)?, 0o640);
    assert!(fs::symlink_metadata(&link)?.file_type().is_symlink());
    assert_eq!(fs::read_dir(folder.path())?.count(), 3);
    let nowhere = folder.path().join("none/a.safetensors");
    fails(lora::save_state_dict(&state, &CFG, &nowhere), &["none/a.safetensors"]);
    Ok(())
}

#[test]
fn what_should_not_be_saved_is_not() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.safetensors");
    fails(lora::save_state_dict(&StateDict::new(), &CFG, &path), &["a.safetensors", "empty"]);
    let nan = StateDict::from([("q.lora_A".to_owned(), Tensor::new(&[f32::NAN], &CPU)?)]);
    fails(lora::save_state_dict(&nan, &CFG, &path), &["a.safetensors", "q.lora_A", "finite"]);
    let (_, vars) = adapter(Bias::None)?;
    let mut state = lora::lora_state_dict(&vars, Bias::None)?;
    let other = LoraConfig { r: 3, ..CFG };
    fails(lora::save_state_dict(&state, &other, &path), &["q.lora_A", "rank is 2", "r = 3"]);
    let nan = LoraConfig { lora_alpha: f64::NAN, ..CFG };
    fails(lora::save_state_dict(&state, &nan, &path), &["lora_alpha is NaN"]);
    state.insert("__metadata__".to_owned(), Tensor::zeros(1, DType::F32, &CPU)?);
    fails(lora::save_state_dict(&state, &CFG, &path), &["__metadata__"]);
    state.remove("__metadata__");
    fails(lora::save_state_dict(&state, &CFG, folder.path()), &["something else than a file"]);
    assert!(!path.exists());
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error_that_changes_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.safetensors");
    let (_, vars) = adapter(Bias::LoraOnly)?;
    randomize(&vars, 5)?;
    let good = lora::lora_state_dict(&vars, Bias::LoraOnly)?;
    lora::save_state_dict(&good, &CFG, &path)?;
    randomize(&vars, 50)?;
    let before = snapshot(&vars);
    for (cfg, words) in [
        (LoraConfig { r: 3, ..CFG }, ["r = 2", "has 3"]),
        (LoraConfig { r: 0, ..CFG }, ["r = 2", "has 0"]),
        (LoraConfig { lora_alpha: 4., ..CFG }, ["lora_alpha = 3", "has 4"]),
        (LoraConfig { rslora: true, ..CFG }, ["rslora = false", "has true"]),
    ] {
        let result = lora::load_checkpoint(&path, &vars, &cfg, Strict::No);
        fails(result, &[words[0], words[1], "a.safetensors"]);
    }
    let load = |change: &dyn Fn(&mut StateDict), strict| {
        let mut state = good.clone();
        change(&mut state);
        lora::load_state_dict(&vars, &state, strict)
    };
    let put = |name: &'static str, t: Tensor| {
        move |s: &mut StateDict| {
            s.insert(name.to_owned(), t.clone());
        }
    };
    for strict in [Strict::Yes, Strict::No] {
        let wrong = put("q.lora_B", Tensor::zeros((2, 4), DType::F32, &CPU)?);
        fails(load(&wrong, strict), &["q.lora_B", "[2, 4]", "[4, 2]"]);
        let ints = put("q.lora_B", Tensor::zeros((4, 2), DType::U32, &CPU)?);
        fails(load(&ints, strict), &["q.lora_B", "U32"]);
        let nan = put("q.lora_B", (Tensor::zeros((4, 2), DType::F32, &CPU)? / 0.)?);
        fails(load(&nan, strict), &["q.lora_B", "finite"]);
        let large = put("q.lora_B", (Tensor::ones((4, 2), DType::F64, &CPU)? * 1e300)?);
        fails(load(&large, strict), &["q.lora_B", "finite"]);
        fails(load(&|s| s.clear(), strict), &["missing", "q.lora_A"]);
    }
    fails(load(&|s| drop(s.remove("q.lora_A")), Strict::Yes), &["missing [\"q.lora_A\"]"]);
    let extra = put("q.lora_C", Tensor::zeros(1, DType::F32, &CPU)?);
    fails(load(&extra, Strict::Yes), &["unexpected [\"q.lora_C\"]"]);
    let twice = put("q.conv.bias", Tensor::zeros(4, DType::F32, &CPU)?);
    fails(load(&twice, Strict::Yes), &["q.bias", "two names"]);
    assert_eq!(snapshot(&vars), before, "an error sets nothing");

    let report = load(&extra, Strict::No)?;
    assert_eq!(report.unexpected, ["q.lora_C"]);
    let report = load(&|s| drop(s.remove("q.lora_A")), Strict::No)?;
    assert_eq!((report.missing.len(), report.loaded.len()), (1, 2));
    Ok(())
}

#[test]
fn a_convolution_s_second_names_are_understood() -> Result<()> {
    let weight = rnd(1, &[4, 3, 3, 3], DType::F32)?.to_device(&CPU)?;
    let bias = rnd(2, &[4], DType::F32)?.to_device(&CPU)?;
    let base = HashMap::from([
        ("c.conv.weight".to_owned(), weight.clone()),
        ("c.conv.bias".to_owned(), bias.clone()),
    ]);
    let base = VarBuilder::from_tensors(base, DType::F32, &CPU);
    let vars = VarMap::new();
    let vb = lora::var_builder(base, &vars, Bias::LoraOnly);
    let layer = lora::conv2d(3, 4, 3, Default::default(), CFG, vb.pp("c"))?;
    assert_eq!(bits(layer.weight())?, bits(&weight)?);
    assert_eq!(names(&vars), ["c.conv.bias", "c.lora_A", "c.lora_B"]);

    let vars = VarMap::new();
    let own = HashMap::from([("c.weight".to_owned(), weight), ("c.bias".to_owned(), bias.clone())]);
    let vb = lora::var_builder(VarBuilder::from_tensors(own, DType::F32, &CPU), &vars, Bias::All);
    lora::conv2d(3, 4, 3, Default::default(), CFG, vb.pp("c"))?;
    let mut state = lora::lora_state_dict(&vars, Bias::All)?;
    state.remove("c.bias");
    state.insert("c.conv.bias".to_owned(), bias.ones_like()?);
    let report = lora::load_state_dict(&vars, &state, Strict::Yes)?;
    assert_eq!(report.loaded, ["c.bias", "c.lora_A", "c.lora_B"]);
    Ok(())
}

/// Damaged files: an error that names the file, or another adapter's values, but never a panic and
/// never a part of a load.
#[test]
fn thousands_of_damaged_files_load_whole_or_not_at_all() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("damaged.safetensors");
    let (_, vars) = adapter(Bias::None)?;
    lora::save_state_dict(&lora::lora_state_dict(&vars, Bias::None)?, &CFG, &path)?;
    let good = fs::read(&path)?;
    randomize(&vars, 5)?;
    let before = snapshot(&vars);
    let mut state = 7u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    let mut damaged: Vec<Vec<u8>> = (0..good.len()).map(|n| good[..n].to_vec()).collect();
    for i in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[i / 8] ^= 1 << (i % 8);
        damaged.push(bytes);
    }
    for _ in 0..2000 {
        let mut bytes = good.clone();
        for _ in 0..1 + random(4) {
            let (at, byte) = (random(bytes.len()), random(256) as u8);
            match random(3) {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        damaged.push(bytes);
    }
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    damaged.push(huge);
    let mut errors = 0;
    for bytes in &damaged {
        fs::write(&path, bytes)?;
        match lora::load_checkpoint(&path, &vars, &CFG, Strict::Yes) {
            Ok(report) => {
                assert_eq!(report.loaded.len(), 2);
                randomize(&vars, 5)?;
            }
            Err(error) => {
                errors += 1;
                assert!(error.to_string().contains("damaged.safetensors"), "{error}");
                assert_eq!(snapshot(&vars), before, "an error sets nothing");
            }
        }
    }
    assert!(damaged.len() > 4000 && errors > good.len(), "{errors} of {}", damaged.len());
    Ok(())
}

#[test]
fn a_newly_loaded_adapter_takes_effect_at_the_next_eval() -> Result<()> {
    let x = rnd(1, &[2, 4], DType::F32)?.to_device(&CPU)?;
    let (mut model, vars) = adapter(Bias::None)?;
    randomize(&vars, 5)?;
    model.eval()?;
    let one = bits(&model.forward(&x)?)?;
    let saved = lora::lora_state_dict(&vars, Bias::None)?;
    randomize(&vars, 6)?;
    model.eval()?;
    assert_ne!(bits(&model.forward(&x)?)?, one);
    let report = lora::load_state_dict(&vars, &saved, Strict::Yes)?;
    assert_eq!(report.loaded.len(), 2);
    model.eval()?;
    assert_eq!(bits(&model.forward(&x)?)?, one);
    Ok(())
}

#[test]
fn variables_in_other_float_types_are_cast() -> Result<()> {
    let vars = VarMap::new();
    let a = Var::from_tensor(&Tensor::zeros(2, DType::BF16, &CPU)?)?;
    vars.data().lock().unwrap().insert("x.lora_A".to_owned(), a.clone());
    let state = StateDict::from([("x.lora_A".to_owned(), Tensor::new(&[1f64, 2.], &CPU)?)]);
    let report = lora::load_state_dict(&vars, &state, Strict::Yes)?;
    assert_eq!(report.loaded, ["x.lora_A"]);
    assert_eq!(common::values(&a)?, [1., 2.]);
    Ok(())
}
