//! Adapters of fused experts and of experts with a matrix each, in either checkpoint, beside PEFT's merges
//! (`fixtures/experts.py`).

use crate::common::{difference, says};
use candle_core::{DType, Device, Module, Tensor};
use lora::adapter::ExpertNames;
use lora::formats::peft;
use lora::merge::merge_into;
use lora::nn::{linear_no_bias, VarBuilder};
use lora::utils::{read_state_dict, StateDict};
use lora::{Adapter, LoraWeights, Result};
use loralib as lora;
use std::path::PathBuf;

const CPU: Device = Device::Cpu;
/// With the number of experts and the names in the checkpoint.
const CASES: [(&str, usize, ExpertNames); 4] = [
    ("mixtral", 3, ExpertNames::Mixtral),
    ("qwen2_moe", 3, ExpertNames::Projections),
    ("qwen3_moe", 3, ExpertNames::Projections),
    ("deepseek_v3", 4, ExpertNames::Projections),
];

fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/experts").join(case)
}

fn tensors(prefix: &str) -> Result<StateDict> {
    let all = read_state_dict(folder("expected.safetensors"), &CPU)?.tensors.into_iter();
    let own = all.filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t)));
    Ok(own.collect())
}

fn merges_as_peft(case: &str, base: &str, weights: &LoraWeights) -> Result<()> {
    let merged = merge_into(&tensors(&format!("{base}.base."))?, weights)?;
    for (name, expected) in tensors(&format!("{case}.merged."))? {
        let apart = difference(&merged[&name], &expected)?;
        assert!(apart < 2e-6, "{case} {name}: {apart}");
    }
    Ok(())
}

fn saved_and_loaded(weights: &LoraWeights) -> Result<LoraWeights> {
    let dir = tempfile::tempdir()?;
    peft::save(dir.path(), weights)?;
    peft::load(dir.path(), &CPU)
}

#[test]
fn fused_factors_merge_into_a_matrix_for_each_expert_as_peft() -> Result<()> {
    for (case, experts, names) in CASES {
        let weights = peft::load(folder(case), &CPU)?;
        merges_as_peft(case, case, &weights)?;
        let split = weights.split_experts(names)?;
        merges_as_peft(case, case, &split)?;
        merges_as_peft(case, case, &saved_and_loaded(&split)?)?;
        // Back, with the same factors: the gate and up projections share A.
        let fused = split.fuse_experts(experts)?;
        merges_as_peft(case, case, &saved_and_loaded(&fused)?)?;
        for (path, layer) in weights.layers() {
            let (_, again) = fused.layers().find(|(own, _)| *own == path).unwrap();
            assert_eq!(difference(&again.a, &layer.a)?, 0., "{case} {path}");
            assert_eq!(difference(&again.b, &layer.b)?, 0., "{case} {path}");
            assert_eq!((again.r, again.lora_alpha), (layer.r, layer.lora_alpha));
        }
    }
    let weights = peft::load(folder("llama4_text"), &CPU)?;
    merges_as_peft("llama4_text", "llama4_text", &weights)
}

/// PEFT's factors of Llama 4 are of the transposed projections, since its parameters are (experts, in, out).
#[test]
fn factors_on_the_outputs_are_turned() -> Result<()> {
    let weights = peft::load(folder("llama4_text"), &CPU)?;
    let split = weights.split_experts(ExpertNames::Projections)?;
    let [base, merged] = ["base", "merged"].map(|of| tensors(&format!("llama4_text.{of}.")));
    let (base, merged) = (base?, merged?);
    let module = "model.layers.0.feed_forward.experts";
    for (projection, name, start) in [
        ("gate_proj", "gate_up_proj", 0),
        ("up_proj", "gate_up_proj", 6),
        ("down_proj", "down_proj", 0),
    ] {
        let fused = format!("{module}.{name}");
        let change = (&merged[&fused] - &base[&fused])?;
        for expert in 0..3 {
            let path = format!("{module}.{expert}.{projection}");
            let (_, layer) = split.layers().find(|(own, _)| **own == path).unwrap();
            let own = (layer.b.matmul(&layer.a)? * 1.5)?;
            let expected = change.get(expert)?.t()?.narrow(0, start, own.dim(0)?)?;
            assert!(difference(&own, &expected)? < 2e-6, "{path}");
        }
    }
    Ok(())
}

#[test]
fn factors_of_each_expert_merge_as_those_that_peft_converts_them_to() -> Result<()> {
    let weights = peft::load(folder("separate"), &CPU)?;
    merges_as_peft("separate", "mixtral", &weights)?;
    let fused = weights.fuse_experts(3)?;
    let layers: Vec<_> =
        fused.layers().map(|(path, layer)| (path, layer.r, layer.lora_alpha)).collect();
    let module = "model.layers.0.mlp.experts";
    let (down, gate_up) = (format!("{module}.down_proj"), format!("{module}.gate_up_proj"));
    // PEFT's ranks and alphas, too.
    assert_eq!(layers, [(&down[..], 2, 3.), (&gate_up[..], 4, 6.)]);
    merges_as_peft("separate", "mixtral", &saved_and_loaded(&fused)?)?;
    // Into a base with fused experts.
    let base = tensors("mixtral.base.")?;
    let stacked = |projections: &[&str], of: &StateDict| -> Result<Tensor> {
        let expert = |e: usize| {
            let name = |w: &&str| format!("model.layers.0.block_sparse_moe.experts.{e}.{w}.weight");
            let all: Vec<_> = projections.iter().map(|w| of[&name(w)].clone()).collect();
            Ok(Tensor::cat(&all, 0)?)
        };
        Ok(Tensor::stack(&(0..3).map(expert).collect::<Result<Vec<_>>>()?, 0)?)
    };
    let fused_of = |of: &StateDict| -> Result<StateDict> {
        let (up, down_proj) = (stacked(&["w1", "w3"], of)?, stacked(&["w2"], of)?);
        Ok([(gate_up.clone(), up), (down.clone(), down_proj)].into())
    };
    let merged = merge_into(&fused_of(&base)?, &weights)?;
    for (name, expected) in fused_of(&tensors("separate.merged.")?)? {
        assert!(difference(&merged[&name], &expected)? < 2e-6, "{name}");
    }
    Ok(())
}

/// A model with a layer for each expert computes with split factors, trains them, and is saved as PEFT has it.
#[test]
fn fused_factors_are_trained_in_a_model_with_a_layer_for_each_expert() -> Result<()> {
    let (case, experts, names) = CASES[2];
    let (base, merged) = (tensors("qwen3_moe.base.")?, tensors("qwen3_moe.merged.")?);
    let split = peft::load(folder(case), &CPU)?.split_experts(names)?;
    let adapter = Adapter::from_weights(&split)?;
    let vb = VarBuilder::from_tensors(base.into_iter().collect(), DType::F32, &CPU);
    let vb = adapter.var_builder(vb);
    let mut layers = vec![linear_no_bias(8, 8, vb.pp("model.layers.0.self_attn.q_proj"))?];
    for expert in 0..experts {
        for (name, ins, outs) in [("gate_proj", 8, 6), ("up_proj", 8, 6), ("down_proj", 6, 8)] {
            let path = format!("model.layers.0.mlp.experts.{expert}.{name}");
            let layer = linear_no_bias(ins, outs, vb.pp(&path))?;
            let x = Tensor::eye(ins, DType::F32, &CPU)?;
            let weight = layer.forward(&x)?.t()?;
            assert!(difference(&weight, &merged[&format!("{path}.weight")])? < 2e-6, "{path}");
            layers.push(layer);
        }
    }
    adapter.check()?;
    for var in adapter.named_vars()?.values() {
        var.set(&(var.as_tensor() * 2.)?)?;
    }
    let saved = saved_and_loaded(&adapter.weights()?.fuse_experts(experts)?)?;
    let again = saved.split_experts(names)?;
    let own = adapter.weights()?;
    for ((path, layer), (_, expected)) in again.layers().zip(own.layers()) {
        let product = |layer: &lora::adapter::LayerWeights| layer.b.matmul(&layer.a);
        assert!(difference(&product(layer)?, &product(expected)?)? < 1e-6, "{path}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_fused_or_split_is_refused_by_name() -> Result<()> {
    let weights = peft::load(folder("separate"), &CPU)?;
    says(weights.fuse_experts(2), &["experts.2.w", "expert 2", "the module has 2"]);
    says(weights.split_experts(ExpertNames::Mixtral), &["no layer is of fused experts"]);
    let fused = peft::load(folder("mixtral"), &CPU)?;
    says(fused.fuse_experts(3), &["no layer is a matrix of an expert"]);
    // Three of four experts have factors: the last has zeros.
    let four = weights.fuse_experts(4)?;
    let (_, down) = four.layers().next().unwrap();
    assert_eq!(down.a.dims(), [4, 2, 6]);
    assert_eq!(down.a.get(3)?.abs()?.sum_all()?.to_scalar::<f32>()?, 0.);
    // Beside a model with a layer for each expert fused factors are an error that tells what to do.
    let adapter = Adapter::from_weights(&fused)?;
    let base = tensors("mixtral.base.")?.into_iter().collect();
    let vb = adapter.var_builder(VarBuilder::from_tensors(base, DType::F32, &CPU));
    let _q = linear_no_bias(8, 8, vb.pp("model.layers.0.self_attn.q_proj"))?;
    let _w1 = linear_no_bias(8, 6, vb.pp("model.layers.0.block_sparse_moe.experts.0.w1"))?;
    says(adapter.check(), &["experts", "split_experts"]);
    Ok(())
}
