//! `finetune`'s GPT-2 agrees with transformers, and trains the selected variables only.

use crate::common::{device, difference, randn};
use crate::gpt2::{Config, Gpt2};
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use lora::layers::LayerKind;
use lora::utils::StateDict;
use lora::{Adapter, Bias, LoraConfig};
use loralib as lora;
use std::collections::HashSet;

const CONFIG: Config = Config {
    vocab_size: 61,
    n_positions: 16,
    n_embd: 24,
    n_layer: 2,
    n_head: 3,
    layer_norm_epsilon: 1e-5,
};

/// Of queries and values, as in the paper.
fn adapter(bias: Bias) -> lora::Result<Adapter> {
    let cfg = LoraConfig { r: 4, lora_alpha: 32., ..Default::default() };
    let query_and_value = LayerKind::MergedLinear(vec![true, false, true]);
    Adapter::new(cfg).targets(["c_attn"]).with_layer("c_attn", query_and_value).trainable(bias)
}

/// The fixture's weights under transformers' names, (out, in), its ids and its logits.
fn fixture() -> Result<(StateDict, Tensor, Tensor)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/gpt2.safetensors");
    let mut tensors = lora::read_state_dict(path, &device())?.tensors;
    let (ids, logits) = (tensors.remove("ids").unwrap(), tensors.remove("logits").unwrap());
    for (name, tensor) in &mut tensors {
        if name.contains(".c_") && name.ends_with(".weight") {
            *tensor = tensor.t()?.contiguous()?;
        }
    }
    Ok((tensors, ids, logits))
}

fn base(tensors: StateDict) -> VarBuilder<'static> {
    let tensors = tensors.into_iter().collect();
    VarBuilder::from_tensors(tensors, DType::F32, &device()).pp("transformer")
}

fn logits(model: &Gpt2, ids: &Tensor) -> Result<Tensor> {
    model.head.forward(&model.hidden(ids)?)
}

#[test]
fn logits_agree_with_transformers() -> lora::Result<()> {
    let (tensors, ids, expected) = fixture()?;
    let model = Gpt2::new(&CONFIG, base(tensors.clone()))?;
    let d = difference(&logits(&model, &ids)?, &expected)?;
    assert!(d < 1e-4, "without an adapter: {d}");

    let adapter = adapter(Bias::None)?;
    let model = Gpt2::new(&CONFIG, adapter.var_builder(base(tensors)))?;
    adapter.check()?;
    let d = difference(&logits(&model, &ids)?, &expected)?;
    assert!(d < 1e-4, "with a fresh adapter: {d}");
    adapter.eval()?;
    let d = difference(&logits(&model, &ids)?, &expected)?;
    assert!(d < 1e-4, "in evaluation: {d}");

    adapter.train()?;
    for var in adapter.vars()? {
        var.set(&(randn(var.shape(), var.dtype(), var.device())? * 0.05)?)?;
    }
    let unmerged = logits(&model, &ids)?;
    assert!(difference(&unmerged, &expected)? > 0.1);
    adapter.eval()?;
    let d = difference(&logits(&model, &ids)?, &unmerged)?;
    assert!(d < 1e-4, "merged and unmerged: {d}");
    Ok(())
}

/// The number of gradients that belong to no variable, and the variables without a gradient.
fn trained(model: &Gpt2, vars: &VarMap) -> Result<(usize, Vec<String>)> {
    let (_, ids, _) = fixture()?;
    let targets = ids.narrow(1, 1, 10)?.flatten_all()?;
    let logits = logits(model, &ids.narrow(1, 0, 10)?)?.flatten(0, 1)?;
    let grads = candle_nn::loss::cross_entropy(&logits, &targets)?.backward()?;
    let data = vars.data().lock().unwrap();
    let ids: HashSet<_> = data.values().map(|var| var.id()).collect();
    let others = grads.get_ids().filter(|id| !ids.contains(id)).count();
    let without = data.iter().filter(|(_, var)| grads.get(var).is_none());
    Ok((others, without.map(|(name, _)| name.clone()).collect()))
}

#[test]
fn pretraining_reaches_every_variable() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device());
    let model = Gpt2::new(&CONFIG, vb)?;
    let (_, without) = trained(&model, &vars)?;
    assert_eq!(without, Vec::<String>::new());
    // Two tables, two tensors of the last norm, twelve of each block.
    assert_eq!(vars.all_vars().len(), 2 + 2 + 2 * 12);
    Ok(())
}

#[test]
fn only_trained_variables_get_gradients() -> lora::Result<()> {
    for (bias, expected) in [(Bias::None, 4), (Bias::LoraOnly, 6), (Bias::All, 4 + 13)] {
        let adapter = adapter(bias)?;
        let model = Gpt2::new(&CONFIG, adapter.var_builder(base(fixture()?.0)))?;
        assert_eq!(adapter.vars()?.len(), expected, "{bias}");
        let (others, without) = trained(&model, adapter.var_map())?;
        assert!(without.is_empty(), "{bias}: {without:?}");
        // candle's sum gives one to the first residual's constant input.
        assert!(others <= 1, "{bias}: {others}");
    }
    Ok(())
}
