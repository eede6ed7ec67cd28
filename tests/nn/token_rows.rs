//! `trainable_token_indices` and `lora_bias` beside everything else: heads, quantised tables, losses, modes and files.

use crate::common::{difference, randn, says};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use lora::adapter::{Adapter, AdapterConfig};
use lora::nn::{embedding, linear_no_bias, Embedding, Linear, VarBuilder};
use lora::train::{linear_cross_entropy, linear_log_probs};
use lora::utils::StateDict;
use lora::{Adapters, Bias, LoraConfig, Result};
use loralib as lora;
use std::sync::Arc;

const CPU: Device = Device::Cpu;
const CFG: LoraConfig = LoraConfig { r: 2, lora_alpha: 3., ..LoraConfig::DEFAULT };
const TABLE: &str = "model.embed_tokens";
const ROWS: &str = "model.embed_tokens.trainable_tokens";

fn base() -> Result<StateDict> {
    let tensor = |name: &str, dims: &[usize]| {
        Ok::<_, lora::Error>((name.to_owned(), randn(dims, DType::F32, &CPU)?))
    };
    let table = tensor("model.embed_tokens.weight", &[9, 32])?;
    Ok([table, tensor("model.q_proj.weight", &[32, 32])?].into())
}

fn vb(tensors: &StateDict, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone().into_iter().collect(), dtype, &CPU)
}

/// A table, a layer, and a head that is tied to the table.
struct Model {
    table: Embedding,
    layer: Linear,
    head: Linear,
}

impl Model {
    /// The head has the table's tensor, or reads its own name, which the base lacks.
    fn new(vb: &VarBuilder, reads_head: bool) -> Result<Self> {
        let table = embedding(9, 32, vb.pp(TABLE))?;
        let layer = linear_no_bias(32, 32, vb.pp("model.q_proj"))?;
        let head = match reads_head {
            true => linear_no_bias(32, 9, vb.pp("lm_head"))?,
            false => Linear::new(table.embeddings().clone(), None),
        };
        Ok(Self { table, layer, head })
    }

    fn hidden(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        self.layer.forward(&self.table.forward(ids)?)?.tanh()
    }

    fn logits(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        self.head.forward(&self.hidden(ids)?)
    }
}

fn config(rows: &[usize]) -> AdapterConfig {
    let mut config = AdapterConfig::from(CFG);
    config.trainable_token_indices.insert("embed_tokens".to_owned(), rows.to_vec());
    config
}

/// An adapter whose variables have other values than at the start.
fn moved(adapter: &Adapter) -> Result<()> {
    for var in adapter.named_vars()?.values() {
        var.set(&randn(var.dims(), var.dtype(), &CPU)?)?;
    }
    Ok(())
}

fn ids() -> Result<Tensor> {
    Ok(Tensor::new(&[[1u32, 4, 0, 7], [7, 7, 8, 2]], &CPU)?)
}

/// The base with rows in the table, and the layer's update.
fn expected(base: &StateDict, adapter: &Adapter, rows: &[usize]) -> Result<Tensor> {
    let vars = adapter.named_vars()?;
    let mut table = base["model.embed_tokens.weight"].to_vec2::<f32>()?;
    for (row, index) in vars[ROWS].to_vec2::<f32>()?.into_iter().zip(rows) {
        table[*index] = row;
    }
    let table = Tensor::new(table, &CPU)?;
    let delta = vars["model.q_proj.lora_B"].matmul(&vars["model.q_proj.lora_A"])?;
    let layer = (&base["model.q_proj.weight"] + (delta * 1.5)?)?;
    let x = table.index_select(&ids()?.flatten_all()?, 0)?;
    Ok(x.matmul(&layer.t()?)?.tanh()?.matmul(&table.t()?)?.reshape((2, 4, 9))?)
}

#[test]
fn a_table_and_its_tied_head_have_the_rows_in_every_mode_and_file() -> Result<()> {
    let (base, rows, dir) = (base()?, [7, 1], tempfile::tempdir()?);
    let named = || Adapter::new(config(&rows)).targets(["q_proj"]);
    let all = || Adapter::new(config(&rows)).targets("all-linear");
    for (adapter, reads_head) in [(named(), false), (named(), true), (all(), false), (all(), true)]
    {
        let model = Model::new(&adapter.var_builder(vb(&base, DType::F32)), reads_head)?;
        adapter.check()?;
        let plain = Model::new(&Adapters::new().var_builder(vb(&base, DType::F32)), reads_head)?;
        let without = plain.logits(&ids()?)?;
        let start = difference(&model.logits(&ids()?)?, &without)?;
        assert!(start < 1e-6, "a new adapter equals its base: {start}");
        moved(&adapter)?;
        let expected = expected(&base, &adapter, &rows)?;
        let close = |logits: &Tensor, what: &str| -> Result<()> {
            let apart = difference(logits, &expected)?;
            assert!(apart < 2e-5, "{what}: {apart}");
            Ok(())
        };
        close(&model.logits(&ids()?)?, "training")?;
        let disabled = adapter.disabled(|| model.logits(&ids()?).map_err(lora::Error::from))?;
        assert_eq!(difference(&disabled, &without)?, 0.);
        adapter.eval()?;
        let y = model.logits(&ids()?)?;
        assert!(!y.track_op());
        close(&y, "evaluation")?;
        for path in [dir.path().join("own.safetensors"), dir.path().join("peft")] {
            match path.extension() {
                Some(_) => adapter.save(&path)?,
                None => adapter.save_pretrained(&path)?,
            }
            let again = Adapter::load(&path, &CPU)?;
            let model = Model::new(&again.var_builder(vb(&base, DType::F32)), reads_head)?;
            again.check()?;
            close(&model.logits(&ids()?)?, "loaded")?;
            let merged = again.merged(vb(&base, DType::F32))?;
            close(&Model::new(&merged, reads_head)?.logits(&ids()?)?, "merged")?;
            adapter.named_vars()?[ROWS].set(&Tensor::zeros((2, 32), DType::F32, &CPU)?)?;
            assert!(adapter.restore(&path)?.missing.is_empty());
        }
        let table = model.table.merged_weight()?;
        let own = adapter.named_vars()?[ROWS].get(0)?;
        assert_eq!(difference(&table.get(7)?, &own)?, 0.);
        assert_eq!(difference(&table.get(0)?, &base["model.embed_tokens.weight"].get(0)?)?, 0.);
        assert_eq!(difference(&model.head.merged_weight()?, &table)?, 0.);
    }
    Ok(())
}

#[test]
fn losses_without_all_logits_train_what_a_tied_head_shares() -> Result<()> {
    let base = base()?;
    let mut follows = AdapterConfig::from(CFG);
    follows.ensure_weight_tying = true;
    let rows = || (config(&[7, 1]), vec!["q_proj"]);
    let updates = || (follows.clone(), vec!["q_proj", "embed_tokens"]);
    for ((config, targets), reads_head) in
        [(rows(), false), (rows(), true), (updates(), false), (updates(), true)]
    {
        let adapter = Adapter::new(config).targets(targets).seed(0);
        let model = Model::new(&adapter.var_builder(vb(&base, DType::F32)), reads_head)?;
        moved(&adapter)?;
        let labels = Tensor::new(&[[4u32, 0, 7, 1], [7, 8, 2, 1]], &CPU)?;
        let logits = model.logits(&ids()?)?.flatten(0, 1)?;
        let plain = candle_nn::loss::cross_entropy(&logits, &labels.flatten_all()?)?;
        let loss = linear_cross_entropy(&model.hidden(&ids()?)?, &model.head, &labels)?;
        let probs = linear_log_probs(&model.hidden(&ids()?)?, &model.head, &labels)?;
        let probs = (probs.mean_all()? * -1.)?;
        let expected = plain.backward()?;
        adapter.require_grads(&expected)?;
        for loss in [loss, probs] {
            assert!(difference(&loss, &plain)? < 1e-5);
            let grads = loss.backward()?;
            for (name, var) in adapter.named_vars()? {
                let apart = difference(grads.get(&var).unwrap(), expected.get(&var).unwrap())?;
                assert!(apart < 1e-5, "{name}: {apart}");
            }
        }
        // And in a segment that is computed again.
        let (table, layer, head) = (model.table.clone(), model.layer.clone(), model.head.clone());
        let y = adapter.checkpoint("", &ids()?, move |ids| {
            head.forward(&layer.forward(&table.forward(ids)?)?.tanh()?)
        })?;
        let loss = candle_nn::loss::cross_entropy(&y.flatten(0, 1)?, &labels.flatten_all()?)?;
        let grads = loss.backward()?;
        for (name, var) in adapter.named_vars()? {
            let apart = difference(grads.get(&var).unwrap(), expected.get(&var).unwrap())?;
            assert!(apart < 1e-6, "{name}: {apart}");
        }
    }
    Ok(())
}

/// A batch without the tokens gives them a gradient of zeros, as in PEFT.
#[test]
fn rows_that_a_batch_lacks_have_no_change() -> Result<()> {
    let adapter = Adapter::new(config(&[3])).targets(["q_proj"]);
    let model = Model::new(&adapter.var_builder(vb(&base()?, DType::F32)), false)?;
    let grads = model.table.forward(&ids()?)?.sum_all()?.backward()?;
    let grad = grads.get(&adapter.named_vars()?[ROWS]).unwrap();
    assert_eq!(grad.abs()?.sum_all()?.to_scalar::<f32>()?, 0.);
    Ok(())
}

#[test]
fn rows_over_half_and_quantised_tables_are_trained_in_f32() -> Result<()> {
    let base = base()?;
    for reads_head in [false, true] {
        let adapter = Adapter::new(config(&[7, 1])).targets(["q_proj"]);
        let half = Model::new(&adapter.var_builder(vb(&base, DType::BF16)), reads_head)?;
        assert_eq!(adapter.named_vars()?[ROWS].dtype(), DType::F32);
        moved(&adapter)?;
        let expected = expected(&base, &adapter, &[7, 1])?;
        let logits = half.logits(&ids()?)?.to_dtype(DType::F32)?;
        let scale = expected.abs()?.max_all()?.to_scalar::<f32>()? as f64;
        assert!(difference(&logits, &expected)? < 0.03 * scale, "{reads_head}");
        let grads = half.logits(&ids()?)?.sum_all()?.backward()?;
        adapter.require_grads(&grads)?;

        let mut tensors = base.clone();
        let mut blocks = vec![];
        for (name, tensor) in &mut tensors {
            let quantised = QTensor::quantize(tensor, GgmlDType::Q8_0)?;
            *tensor = quantised.dequantize(&CPU)?;
            blocks.push((name.clone(), Arc::new(quantised)));
        }
        let quantised = lora::gguf::var_builder(blocks.into_iter().collect(), DType::F32, &CPU);
        let adapter = Adapter::new(config(&[7, 1])).targets(["q_proj"]);
        let model = Model::new(&adapter.var_builder(quantised), reads_head)?;
        assert_eq!(
            difference(
                &adapter.named_vars()?[ROWS].get(0)?,
                &tensors["model.embed_tokens.weight"].get(7)?
            )?,
            0.
        );
        moved(&adapter)?;
        let apart =
            difference(&model.logits(&ids()?)?, &self::expected(&tensors, &adapter, &[7, 1])?)?;
        assert!(apart < 2e-4, "{apart}");
        adapter.eval()?;
        let apart =
            difference(&model.logits(&ids()?)?, &self::expected(&tensors, &adapter, &[7, 1])?)?;
        assert!(apart < 2e-4, "{apart}");
    }
    Ok(())
}

#[test]
fn rows_that_cannot_be_trained_are_refused_by_name() -> Result<()> {
    let base = base()?;
    let check = |adapter: Adapter| -> Result<()> {
        let _model = Model::new(&adapter.var_builder(vb(&base, DType::F32)), false)?;
        adapter.check()
    };
    let new = |config| Adapter::new(config).targets(["q_proj"]);
    says(check(new(config(&[1, 9]))), &[TABLE, "trainable_token_indices[1] is 9", "9 rows"]);
    says(check(new(config(&[1, 2, 1]))), &[TABLE, "trainable_token_indices has 1 twice"]);
    says(check(new(config(&[]))), &[TABLE, "trainable_token_indices is empty"]);
    // Also without a check, before anything is trained.
    let beyond = new(config(&[1, 9]));
    let _model = Model::new(&beyond.var_builder(vb(&base, DType::F32)), false)?;
    says(beyond.named_vars(), &[TABLE, "trainable_token_indices[1] is 9"]);
    let mut other = config(&[1]);
    other.trainable_token_indices.insert("wte".to_owned(), vec![2]);
    says(check(new(other)), &["trainable_token_indices has \"wte\"", "embed_tokens"]);
    let both = Adapter::new(config(&[1])).targets(["q_proj", "embed_tokens"]);
    says(check(both), &[TABLE, "trainable_token_indices", "is a target"]);
    let whole = new(config(&[1])).trainable(Bias::None.and("embed_tokens"))?;
    says(check(whole), &[TABLE, "trainable_token_indices", "as a whole"]);
    let set = Adapters::new();
    let _model = Model::new(&set.var_builder(vb(&base, DType::F32)), false)?;
    says(set.add("a", &new(config(&[1]))), &["\"a\"", "trainable_token_indices", "merge"]);
    Ok(())
}

#[test]
fn the_bias_of_b_adds_to_the_layer_s() -> Result<()> {
    let cfg = LoraConfig { lora_bias: true, ..CFG };
    let (w, bias) = (randn(&[5, 6], DType::F32, &CPU)?, randn(&[5], DType::F32, &CPU)?);
    let x = randn(&[3, 6], DType::F32, &CPU)?;
    let vars = candle_nn::VarMap::new();
    let of = |name: &str| vars.data().lock().unwrap()[name].clone();
    for own in [Some(bias), None] {
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let mut layer = lora::Linear::new(candle_nn::Linear::new(w.clone(), own.clone()), cfg, vb)?;
        let base = candle_nn::Linear::new(w.clone(), own.clone());
        for name in ["lora_A", "lora_B", "lora_bias"] {
            of(name).set(&randn(of(name).dims(), DType::F32, &CPU)?)?;
        }
        let delta = (x.matmul(&of("lora_A").t()?)?.matmul(&of("lora_B").t()?)? * 1.5)?;
        let expected =
            (base.forward(&x)? + delta)?.broadcast_add(&(of("lora_bias").as_tensor() * 1.5)?)?;
        let y = layer.forward(&x)?;
        assert!(difference(&y, &expected)? < 1e-5);
        let grad = y.sum_all()?.backward()?.get(&of("lora_bias")).unwrap().to_vec1::<f32>()?;
        assert_eq!(grad, [4.5; 5]);
        use lora::LoraModule;
        layer.eval()?;
        assert!(difference(&layer.forward(&x)?, &expected)? < 1e-5);
        let merged = layer.into_merged()?;
        assert!(difference(&merged.forward(&x)?, &expected)? < 1e-5);
    }
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let new = |cfg| lora::Linear::new(candle_nn::Linear::new(w.clone(), None), cfg, vb.clone());
    says(new(LoraConfig { use_dora: true, ..cfg }), &["lora_bias and use_dora"]);
    let table = lora::embedding(9, 4, cfg, vb.pp("t"));
    says(table, &["an embedding does not support lora_bias"]);
    let fused = lora::merged_linear(6, 6, &[true, false], cfg, vb.pp("m"));
    says(fused, &["lora_bias"]);
    Ok(())
}

/// New tokens: the base's table and head have fewer rows than the model.
#[test]
fn rows_for_new_tokens_are_the_mean_of_the_others_and_are_trained() -> Result<()> {
    let mut base = base()?;
    let larger = |vb: &VarBuilder, head: &str| -> Result<(Embedding, Linear)> {
        let table = embedding(11, 32, vb.pp(TABLE))?;
        Ok((table, linear_no_bias(32, 11, vb.pp(head))?))
    };
    for has_head in [false, true] {
        if has_head {
            base.insert("lm_head.weight".to_owned(), randn(&[9, 32], DType::F32, &CPU)?);
        }
        let resized = || lora::base::resized_embeddings(vb(&base, DType::F32));
        let mut config = config(&[9, 10]);
        if has_head {
            config.trainable_token_indices.insert("lm_head".to_owned(), vec![10, 9]);
        }
        let adapter = Adapter::new(config);
        let (table, head) = larger(&adapter.var_builder(resized()), "lm_head")?;
        adapter.check()?;
        let own = &base["model.embed_tokens.weight"];
        let new = table.forward(&Tensor::new(&[9u32, 10, 3], &CPU)?)?;
        for row in 0..2 {
            assert!(difference(&new.get(row)?, &own.mean(0)?)? < 1e-6);
        }
        assert_eq!(difference(&new.get(2)?, &own.get(3)?)?, 0.);
        moved(&adapter)?;
        assert_eq!(adapter.named_vars()?.len(), 1 + usize::from(has_head));
        let x = randn(&[2, 32], DType::F32, &CPU)?;
        let (rows, logits) = (table.forward(&Tensor::new(&[10u32, 9], &CPU)?)?, head.forward(&x)?);
        // Loaded beside a base that is resized again, and merged into it.
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("adapter.safetensors");
        adapter.save(&path)?;
        let again = Adapter::load(&path, &CPU)?;
        for vb in [again.var_builder(resized()), again.merged(resized())?] {
            let (table, head) = larger(&vb, "lm_head")?;
            let own = table.forward(&Tensor::new(&[10u32, 9], &CPU)?)?;
            assert!(difference(&own, &rows)? < 1e-6);
            assert!(difference(&head.forward(&x)?, &logits)? < 1e-5);
        }
    }
    let smaller = embedding(8, 32, lora::base::resized_embeddings(vb(&base, DType::F32)).pp(TABLE));
    says(smaller, &["[9, 32]", "[8, 32]"]);
    says(larger(&vb(&base, DType::F32), "lm_head"), &["[9, 32]", "[11, 32]"]);
    Ok(())
}

#[test]
fn a_head_of_another_size_has_the_base_s_name_if_it_may() -> Result<()> {
    let mut base = base()?;
    base.insert("classifier.weight".to_owned(), randn(&[2, 32], DType::F32, &CPU)?);
    base.insert("classifier.bias".to_owned(), randn(&[2], DType::F32, &CPU)?);
    let new = |adapter: &Adapter, labels| {
        lora::nn::linear(32, labels, adapter.var_builder(vb(&base, DType::F32)).pp("classifier"))
    };
    let head = || Adapter::new(CFG).trainable(Bias::None.and("classifier"));
    says(new(&head()?, 5), &["classifier.weight", "[2, 32]", "[5, 32]", "ignore_mismatched_sizes"]);
    let adapter = head()?.ignore_mismatched_sizes().seed(0);
    let layer = new(&adapter, 5)?;
    assert_eq!(adapter.named_vars()?["classifier.weight"].dims(), [5, 32]);
    assert!(layer.weight().abs()?.max_all()?.to_scalar::<f32>()? > 0.);
    // One of the same size keeps the base's values.
    let same = new(&head()?.ignore_mismatched_sizes(), 2)?;
    assert_eq!(difference(same.weight(), &base["classifier.weight"])?, 0.);
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapter.safetensors");
    adapter.save(&path)?;
    let again = Adapter::load(&path, &CPU)?;
    assert_eq!(difference(new(&again, 5)?.weight(), layer.weight())?, 0.);
    Ok(())
}

/// In loralib's functions a bias of B is the adapter's, and not the base's.
#[test]
fn the_bias_of_b_is_in_the_adapter_s_state_dict() -> Result<()> {
    use lora::utils::Strict;
    let cfg = LoraConfig { lora_bias: true, ..CFG };
    let vars = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let _layer = lora::linear(6, 5, cfg, vb.pp("fc"))?;
    let state = lora::lora_state_dict(&vars, Bias::None)?;
    let names: Vec<_> = state.keys().map(String::as_str).collect();
    assert_eq!(names, ["fc.lora_A", "fc.lora_B", "fc.lora_bias"]);
    let base: StateDict = [
        ("fc.weight".to_owned(), randn(&[5, 6], DType::F32, &CPU)?),
        ("fc.bias".to_owned(), randn(&[5], DType::F32, &CPU)?),
    ]
    .into();
    assert!(lora::load_state_dict(&vars, &base, Strict::Yes)?.missing.is_empty());
    assert!(lora::load_state_dict(&vars, &state, Strict::Yes)?.missing.is_empty());
    lora::mark_only_lora_as_trainable(&vars, Bias::None)
        .map(|trained| assert_eq!(trained.len(), 3))?;
    Ok(())
}
