//! Models that tie their head to the embeddings, beside what PEFT computes (`fixtures/tied.py`).

use crate::common::{difference, randn, says};
use crate::CPU;
use candle_core::{DType, Module, Tensor};
use lora::adapter::AdapterConfig;
use lora::merge::{merge_files, merge_into};
use lora::nn::{embedding, linear_no_bias, Embedding, Linear, VarBuilder};
use lora::utils::{read_state_dict, StateDict};
use lora::{formats::peft, Adapter, Bias, LoraConfig, Result};
use loralib as lora;
use std::path::{Path, PathBuf};

const CASES: [&str; 10] = [
    "table",
    "table_tied",
    "table_and_head",
    "head",
    "lora_table",
    "dora_table",
    "lora_head",
    "dora_head",
    "lora_table_and_head",
    "rows",
];
/// Further pairs of changes.
const PAIRS: [&str; 4] = [
    "rows_and_lora_head",
    "table_and_lora_head",
    "lora_table_and_same_head",
    "before_the_first_step",
];
/// The head computes with the embeddings.
const TIED: [&str; 2] = ["table_tied", "rows"];
const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const Q: &str = "model.layers.0.self_attn.q_proj";
const VOCAB: usize = 20;
const HIDDEN: usize = 8;

fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tied").join(case)
}

fn with_prefix(prefix: &str) -> Result<StateDict> {
    let all = read_state_dict(folder("expected.safetensors"), &CPU)?.tensors;
    let own = all.into_iter().filter_map(|(k, t)| Some((k.strip_prefix(prefix)?.to_owned(), t)));
    Ok(own.collect())
}

fn base() -> Result<StateDict> {
    with_prefix("base.")
}

fn vb(tensors: &StateDict) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone().into_iter().collect(), DType::F32, &CPU)
}

/// The embeddings and the head's weight are PEFT's.
fn assert_peft_s(case: &str, embeddings: &Tensor, head: &Tensor) -> Result<()> {
    let expected = with_prefix(&format!("{case}."))?;
    for (name, ours) in [("embed", embeddings), ("head", head)] {
        let apart = difference(ours, &expected[name])?;
        assert!(apart < 2e-6, "{case}.{name}: {apart}");
    }
    Ok(())
}

#[test]
fn merged_tables_and_heads_are_those_of_peft() -> Result<()> {
    for case in CASES {
        let merged = merge_into(&base()?, &peft::load(folder(case), &CPU)?)?;
        assert_eq!(merged.contains_key(HEAD), !TIED.contains(&case), "{case}");
        assert_peft_s(case, &merged[TABLE], merged.get(HEAD).unwrap_or(&merged[TABLE]))?;
    }
    Ok(())
}

#[test]
fn pairs_of_changes_are_those_of_peft() -> Result<()> {
    for case in PAIRS {
        let merged = merge_into(&base()?, &peft::load(folder(case), &CPU)?)?;
        assert_peft_s(case, &merged[TABLE], merged.get(HEAD).unwrap_or(&merged[TABLE]))?;
        // A model that ties its head computes the same, or `check` tells.
        let adapter = Adapter::load(folder(case), &CPU)?;
        let merged = Model::new(&adapter.merged(vb(&base()?))?, true)?;
        if adapter.check().is_ok() {
            merged.assert_peft_s(case)?;
        }
        let adapter = Adapter::load(folder(case), &CPU)?;
        let _model = Model::new(&adapter.var_builder(vb(&base()?)), true)?;
        assert!(adapter.check().is_err(), "{case}");
    }
    Ok(())
}

/// As `torch.save` and some converters write a tied base: a model that ties its head does not read the second one.
#[test]
fn a_tied_head_that_the_base_has_a_second_time_is_not_lost() -> Result<()> {
    let mut both = base()?;
    both.insert(HEAD.to_owned(), both[TABLE].clone());
    for case in ["table", "lora_table", "dora_table", "head", "lora_head"] {
        for is_tied in [false, true] {
            let adapter = Adapter::load(folder(case), &CPU)?;
            let model = Model::new(&adapter.merged(vb(&both))?, is_tied)?;
            match adapter.check() {
                Ok(()) => model.assert_peft_s(case)?,
                Err(e) => assert!(is_tied && e.to_string().contains(HEAD), "{case}: {e}"),
            }
            assert_eq!(adapter.check().is_ok(), !is_tied, "{case}");
        }
    }
    Ok(())
}

/// Two tensors that are trained apart are equal before the first step.
#[test]
fn a_table_and_a_head_that_are_trained_apart_stay_two() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let cfg = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    let apart = Bias::None.and("embed_tokens").and("lm_head");
    let adapter = Adapter::new(cfg).targets(["q_proj"]).trainable(apart)?;
    let _model = Model::new(&adapter.var_builder(vb(&base()?)), false)?;
    adapter.save_pretrained(dir.path())?;
    let own = dir.path().join("own.safetensors");
    adapter.save(&own)?;
    for path in [dir.path(), own.as_path(), &folder("before_the_first_step")] {
        let again = Adapter::load(path, &CPU)?;
        assert!(again.named_vars()?.contains_key(HEAD));
        assert!(!again.weights()?.config().ensure_weight_tying);
    }
    assert!(adapter.restore(&own)?.missing.is_empty());
    // One that is tied is one variable also where PEFT's configuration names one of the two.
    let tied = Adapter::load(folder("table_tied"), &CPU)?;
    let model = Model::new(&tied.var_builder(vb(&base()?)), false)?;
    tied.check()?;
    assert_eq!(model.head.weight().id(), tied.named_vars()?[TABLE].id());
    Ok(())
}

#[test]
fn a_run_is_not_restored_where_the_head_is_another_one() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let cfg = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    let new = |is_tied: bool| -> Result<(Adapter, Model)> {
        let table = Bias::None.and("embed_tokens");
        let adapter = Adapter::new(cfg).targets(["q_proj"]).trainable(table)?;
        let model = Model::new(&adapter.var_builder(vb(&base()?)), is_tied)?;
        Ok((adapter, model))
    };
    for is_tied in [false, true] {
        let (saved, _model) = new(is_tied)?;
        let path = dir.path().join("adapter.safetensors");
        saved.save(&path)?;
        let (other, _model) = new(!is_tied)?;
        let error = other.restore(&path).unwrap_err().to_string();
        assert!(error.contains(HEAD) && error.contains("tie_word_embeddings"), "{error}");
    }
    let (tied, _model) = new(true)?;
    assert!(tied.restore(folder("table")).is_err());
    assert!(tied.restore(folder("table_tied"))?.missing.is_empty());
    Ok(())
}

/// As in MLX, and by PEFT's `ensure_weight_tying`.
#[test]
fn a_head_follows_the_update_of_its_table() -> Result<()> {
    let weights = peft::load(folder("lora_table"), &CPU)?;
    let mut config = weights.config();
    config.ensure_weight_tying = true;
    let mut tensors = weights.state_dict();
    tensors.remove(TABLE);
    let weights = lora::LoraWeights::new(config, tensors)?;
    let dir = tempfile::tempdir()?;
    for is_tied in [false, true] {
        let adapter = Adapter::from_weights(&weights)?;
        let model = Model::new(&adapter.var_builder(vb(&base()?)), is_tied)?;
        adapter.check()?;
        let merged = merge_into(&base()?, &weights)?;
        let x = randn(&[3, HIDDEN], DType::F32, &CPU)?;
        let expected = x.matmul(&merged[TABLE].t()?)?;
        assert!(difference(&model.head.forward(&x)?, &expected)? < 1e-5);
        // The gradient of the table's factors is the sum of both layers'.
        let ids = Tensor::new(&[3u32, 5, 5], &CPU)?;
        let y =
            (model.head.forward(&model.embed.forward(&ids)?)? * expected.detach())?.sum_all()?;
        let grads = y.backward()?;
        let [a, b] = ["lora_A", "lora_B"].map(|name| {
            adapter.named_vars().map(|v| v[&format!("model.embed_tokens.{name}")].clone())
        });
        let (a, b) = (a?, b?);
        let loss = || -> Result<f64> {
            let table = (&base()?[TABLE] + (a.t()?.matmul(&b.t()?)? * 1.5)?)?;
            let y = table.index_select(&ids, 0)?.matmul(&table.t()?)?;
            Ok(f64::from((y * &expected)?.sum_all()?.to_scalar::<f32>()?))
        };
        let direction = randn(a.dims(), DType::F32, &CPU)?;
        let at = a.copy()?;
        let mut moved = [0.; 2];
        for (value, by) in moved.iter_mut().zip([1e-2, -1e-2]) {
            a.set(&(&at + (&direction * by)?)?)?;
            *value = loss()?;
        }
        a.set(&at)?;
        let slope = (moved[0] - moved[1]) / 2e-2;
        let own = (grads.get(&a).unwrap() * &direction)?.sum_all()?.to_scalar::<f32>()?;
        assert!((f64::from(own) - slope).abs() < 1e-2 * slope.abs().max(1.), "{own} {slope}");
        adapter.eval()?;
        assert!(difference(&model.head.forward(&x)?, &expected)? < 1e-5);
        // In files the head has the factors too, and is one with the table again.
        for path in [dir.path().join("own.safetensors"), dir.path().join("peft")] {
            match path.extension() {
                Some(_) => adapter.save(&path)?,
                None => adapter.save_pretrained(&path)?,
            }
            let again = Adapter::load(&path, &CPU)?;
            assert_eq!(again.named_vars()?.len(), 4);
            let weights = again.weights()?;
            let [head, table] = ["lm_head", "model.embed_tokens"]
                .map(|path| weights.layers().find(|(own, _)| *own == path).unwrap().1);
            assert_eq!(difference(&head.a, &table.b.t()?)?, 0.);
            let model = Model::new(&again.var_builder(vb(&base()?)), is_tied)?;
            again.check()?;
            assert!(difference(&model.head.forward(&x)?, &expected)? < 1e-5);
        }
        let dora = LoraConfig { r: 2, lora_alpha: 3., use_dora: true, ..Default::default() };
        let mut config = AdapterConfig::from(dora);
        config.ensure_weight_tying = true;
        let adapter = Adapter::new(config).targets(["embed_tokens"]);
        let _model = Model::new(&adapter.var_builder(vb(&base()?)), is_tied)?;
        says(adapter.check(), &["model.embed_tokens", "use_dora", "ensure_weight_tying"]);
        let set = lora::Adapters::new();
        let _model = Model::new(&set.var_builder(vb(&base()?)), is_tied)?;
        assert!(set.add("a", &Adapter::from_weights(&weights)?).is_err());
    }
    let adapter = Adapter::from_weights(&weights)?;
    let model = Model::new(&adapter.merged(vb(&base()?))?, true)?;
    adapter.check()?;
    let merged = merge_into(&base()?, &weights)?;
    assert_eq!(difference(model.head.weight(), &merged[TABLE])?, 0.);
    Ok(())
}

#[test]
fn merged_files_have_the_head_beside_the_table() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (one, many) = (dir.path().join("one.safetensors"), dir.path().join("many"));
    std::fs::create_dir(&many)?;
    candle_core::safetensors::save(&base()?.into_iter().collect(), &one)?;
    let (first, second): (StateDict, StateDict) =
        base()?.into_iter().partition(|(name, _)| name.contains("layers"));
    let mut index = serde_json::json!({"metadata": {"total_size": 1000}, "weight_map": {}});
    for (file, tensors) in [("1.safetensors", first), ("2.safetensors", second)] {
        for name in tensors.keys() {
            index["weight_map"][name] = file.into();
        }
        candle_core::safetensors::save(&tensors.into_iter().collect(), many.join(file))?;
    }
    std::fs::write(many.join("model.safetensors.index.json"), index.to_string())?;
    for case in CASES {
        let weights = peft::load(folder(case), &CPU)?;
        let expected = merge_into(&base()?, &weights)?;
        let untied: &[&str] = if TIED.contains(&case) { &[] } else { &[HEAD] };
        let (to, to_many) = (dir.path().join("out.safetensors"), dir.path().join("out"));
        let mut last = None;
        assert_eq!(merge_files(&one, &weights, &to, |p| last = Some(p))?.untied, untied, "{case}");
        assert_eq!(last.map(|p| p.done), last.map(|p| p.total), "{case}");
        let merged = read_state_dict(&to, &CPU)?.tensors;
        assert_eq!(merge_files(&many, &weights, &to_many, |_| {})?.untied, untied, "{case}");
        let index = std::fs::read_to_string(to_many.join("model.safetensors.index.json"))?;
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        let mut sharded = StateDict::new();
        for file in ["1.safetensors", "2.safetensors"] {
            let part = read_state_dict(to_many.join(file), &CPU)?.tensors;
            assert!(part.keys().all(|name| index["weight_map"][name] == file), "{case}");
            sharded.extend(part);
        }
        let size = if untied.is_empty() { 1000 } else { 1000 + VOCAB * HIDDEN * 4 };
        assert_eq!(index["metadata"]["total_size"], size, "{case}");
        for ours in [merged, sharded] {
            assert!(ours.keys().eq(expected.keys()), "{case}");
            for (name, tensor) in &ours {
                assert_eq!(difference(tensor, &expected[name])?, 0., "{case} {name}");
            }
        }
    }
    Ok(())
}

/// candle's model with `tie_word_embeddings: false`, and with `true`.
struct Model {
    embed: Embedding,
    _q: Linear,
    head: Linear,
}

impl Model {
    fn new(vb: &VarBuilder, is_tied: bool) -> Result<Self> {
        let embed = embedding(VOCAB, HIDDEN, vb.pp("model.embed_tokens"))?;
        let head = match is_tied {
            true => Linear::new(embed.embeddings().clone(), None),
            false => linear_no_bias(HIDDEN, VOCAB, vb.pp("lm_head"))?,
        };
        Ok(Self { embed, _q: linear_no_bias(HIDDEN, HIDDEN, vb.pp(Q))?, head })
    }

    fn assert_peft_s(&self, case: &str) -> Result<()> {
        let embeddings = self.embed.forward(&Tensor::arange(0u32, VOCAB as u32, &CPU)?)?;
        let head = self.head.forward(&Tensor::eye(HIDDEN, DType::F32, &CPU)?)?.t()?;
        assert_peft_s(case, &embeddings, &head)
    }
}

#[test]
fn a_model_without_tying_computes_as_peft_s() -> Result<()> {
    for case in CASES.into_iter().chain(PAIRS) {
        let adapter = Adapter::load(folder(case), &CPU)?;
        let model = Model::new(&adapter.merged(vb(&base()?))?, false)?;
        adapter.check()?;
        model.assert_peft_s(case)?;
        let adapter = Adapter::load(folder(case), &CPU)?;
        let model = Model::new(&adapter.var_builder(vb(&base()?)), false)?;
        if case == "rows_and_lora_head" {
            // One layer has the rows or factors.
            says(adapter.check(), &["lm_head", "trainable_token_indices"]);
            continue;
        }
        adapter.check()?;
        model.assert_peft_s(case)?;
        adapter.eval()?;
        model.assert_peft_s(case)?;
    }
    Ok(())
}

#[test]
fn a_model_with_tying_computes_as_peft_s_or_check_is_an_error() -> Result<()> {
    for case in CASES {
        let adapter = Adapter::load(folder(case), &CPU)?;
        let model = Model::new(&adapter.merged(vb(&base()?))?, true)?;
        match adapter.check() {
            Ok(()) => model.assert_peft_s(case)?,
            Err(e) => assert!(e.to_string().contains("tie_word_embeddings: false"), "{case}: {e}"),
        }
        assert_eq!(adapter.check().is_ok(), TIED.contains(&case), "{case}");
        let adapter = Adapter::load(folder(case), &CPU)?;
        let model = Model::new(&adapter.var_builder(vb(&base()?)), true)?;
        let fits = ["table_tied", "lora_table", "dora_table", "rows"].contains(&case);
        assert_eq!(adapter.check().is_ok(), fits, "{case}");
        if fits {
            model.assert_peft_s(case)?;
            adapter.eval()?;
            model.assert_peft_s(case)?;
        }
    }
    Ok(())
}

/// As with PEFT's `ensure_weight_tying`: the file has the head too.
#[test]
fn a_table_that_is_trained_with_its_head_is_saved_for_both() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let cfg = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    let new = || Adapter::new(cfg).targets(["q_proj"]).trainable(Bias::None.and("embed_tokens"));
    let adapter = new()?;
    let _model = Model::new(&adapter.var_builder(vb(&base()?)), true)?;
    adapter.check()?;
    let table = randn(&[VOCAB, HIDDEN], DType::F32, &CPU)?;
    adapter.named_vars()?[TABLE].set(&table)?;
    let file = dir.path().join("adapter.safetensors");
    adapter.save(&file)?;
    adapter.save_pretrained(dir.path())?;
    let json = std::fs::read_to_string(dir.path().join("adapter_config.json"))?;
    assert!(json.contains("\"ensure_weight_tying\": true"), "{json}");
    for path in [&file as &Path, dir.path()] {
        let again = Adapter::load(path, &CPU)?;
        let weights = again.weights()?.state_dict();
        assert_eq!(difference(&weights[HEAD], &table)?, 0.);
        // It goes on as one tensor.
        let model = Model::new(&again.var_builder(vb(&base()?)), true)?;
        again.check()?;
        assert!(!again.named_vars()?.contains_key(HEAD));
        assert_eq!(difference(model.head.weight(), &table)?, 0.);
        let model = Model::new(&again.var_builder(vb(&base()?)), false)?;
        assert_eq!(model.head.weight().id(), again.named_vars()?[TABLE].id());
        let merged = merge_into(&base()?, &again.weights()?)?;
        assert!(!merged.contains_key(HEAD) && difference(&merged[TABLE], &table)? == 0.);
        // And is restored.
        let other = new()?;
        let _model = Model::new(&other.var_builder(vb(&base()?)), true)?;
        assert!(other.restore(path)?.missing.is_empty());
        assert_eq!(difference(other.named_vars()?[TABLE].as_tensor(), &table)?, 0.);
    }
    Ok(())
}

/// A head that the base ties begins with the table's values.
#[test]
fn a_trained_head_begins_with_the_table() -> Result<()> {
    let cfg = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    let adapter = Adapter::new(cfg).targets(["q_proj"]).trainable(Bias::None.and("lm_head"))?;
    let model = Model::new(&adapter.var_builder(vb(&base()?)), false)?;
    adapter.check()?;
    assert!(adapter.named_vars()?.contains_key(HEAD));
    assert_eq!(difference(model.head.weight(), &base()?[TABLE])?, 0.);
    Ok(())
}

/// The names of the merged tensors of a base with these names, of which the first is an adapted table.
fn merged_names(names: &[&str], others: &[(&str, &[usize])]) -> Result<Vec<String>> {
    let tensor = |dims: &[usize]| randn(dims, DType::F32, &CPU);
    let base = names.iter().map(|name| Ok(((*name).to_owned(), tensor(&[VOCAB, HIDDEN])?)));
    let path = names[0].strip_suffix(".weight").unwrap();
    let pair = [("lora_A", [2, VOCAB]), ("lora_B", [HIDDEN, 2])];
    let pair = pair.map(|(last, dims)| Ok((format!("{path}.{last}"), tensor(&dims)?)));
    let others = others.iter().map(|(name, dims)| Ok(((*name).to_owned(), tensor(dims)?)));
    let tensors = pair.into_iter().chain(others).collect::<Result<StateDict>>()?;
    let cfg = LoraConfig { r: 2, ..Default::default() };
    let config = lora::adapter::AdapterConfig::from(cfg)
        .with_layer(path, lora::layers::LayerKind::Embedding);
    let base = base.collect::<Result<StateDict>>()?;
    let merged = merge_into(&base, &lora::LoraWeights::new(config, tensors)?)?;
    Ok(merged.into_keys().collect())
}

#[test]
fn a_base_without_a_tied_head_gets_none() -> Result<()> {
    let bert = "bert.embeddings.word_embeddings.weight";
    assert_eq!(merged_names(&[bert], &[])?, [bert], "an encoder");
    let mlm = ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"];
    assert!(merged_names(&mlm, &[])?.contains(&"cls.predictions.decoder.weight".to_owned()));
    assert_eq!(merged_names(&[TABLE, HEAD], &[])?, [HEAD, TABLE], "it has its own");
    assert_eq!(merged_names(&["embed_tokens.weight"], &[])?, ["embed_tokens.weight"]);
    // Of a classifier.
    let score: (&str, &[usize]) = ("score.weight", &[VOCAB, HIDDEN]);
    let names = merged_names(&[TABLE, "score.weight"], &[score])?;
    assert_eq!(names, [TABLE, "score.weight"]);
    let whisper = ["model.decoder.embed_tokens.weight", "model.encoder.conv1.weight"];
    assert!(merged_names(&whisper, &[])?.contains(&"proj_out.weight".to_owned()));
    Ok(())
}

#[test]
fn a_base_with_a_head_of_its_own_keeps_it() -> Result<()> {
    let head = randn(&[VOCAB, HIDDEN], DType::F32, &CPU)?;
    let mut base = base()?;
    base.insert(HEAD.to_owned(), head.clone());
    for case in ["table", "lora_table", "rows"] {
        let weights = peft::load(folder(case), &CPU)?;
        assert_eq!(difference(&merge_into(&base, &weights)?[HEAD], &head)?, 0., "{case}");
        let merged = Adapter::from_weights(&weights)?.merged(vb(&base))?;
        assert_eq!(difference(&merged.get((VOCAB, HIDDEN), HEAD)?, &head)?, 0., "{case}");
    }
    Ok(())
}

/// PEFT writes a table that it does not train into the base's own, which the head is, too.
#[test]
fn a_head_follows_a_table_that_is_written_into_the_base_s() -> Result<()> {
    let table = randn(&[VOCAB, HIDDEN], DType::F32, &CPU)?;
    let mut weights = peft::load(folder("lora_table"), &CPU)?.state_dict();
    let config = peft::load(folder("lora_table"), &CPU)?.config();
    weights.insert(TABLE.to_owned(), table.clone());
    let weights = lora::LoraWeights::new(config, weights)?;
    let merged = merge_into(&base()?, &weights)?;
    assert_eq!(difference(&merged[HEAD], &table)?, 0.);
    let adapter = Adapter::from_weights(&weights)?;
    let vb = adapter.merged(vb(&base()?))?;
    assert!(vb.contains_tensor(HEAD) && !vb.contains_tensor("model.layers.0.lora_A"));
    assert_eq!(difference(&vb.get((VOCAB, HIDDEN), HEAD)?, &table)?, 0.);
    Ok(())
}
