//! Adapters of fused experts and of experts with a matrix each, in either checkpoint, beside PEFT's merges
//! (`fixtures/experts.py`).

use crate::common::{difference, says};
use candle_core::{DType, Device, Module, Tensor};
use lora::adapter::{AdapterConfig, ExpertNames};
use lora::formats::peft;
use lora::merge::merge_into;
use lora::nn::{linear_no_bias, Linear, VarBuilder};
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

/// The layers of each expert, as a checkpoint has them, and of the query.
fn layers(vb: &VarBuilder, merged: &StateDict) -> Result<Vec<(String, Linear)>> {
    let layer = |(name, weight): (&String, &Tensor)| {
        let (path, (outs, ins)) = (name.trim_end_matches(".weight"), weight.dims2()?);
        Ok((name.clone(), linear_no_bias(ins, outs, vb.pp(path))?))
    };
    merged.iter().map(layer).collect()
}

/// The variables are PEFT's, and are saved as such: the gate and up projections of an expert share A.
#[test]
fn fused_factors_are_trained_in_a_model_with_a_layer_for_each_expert() -> Result<()> {
    for (case, ..) in CASES {
        let [base, merged] = ["base", "merged"].map(|of| tensors(&format!("{case}.{of}.")));
        let (base, merged) = (base?, merged?);
        let vb = || VarBuilder::from_tensors(base.clone().into_iter().collect(), DType::F32, &CPU);
        let adapter = Adapter::load(folder(case), &CPU)?;
        let model = layers(&adapter.var_builder(vb()), &merged)?;
        adapter.check()?;
        let computes = |expected: &StateDict| -> Result<()> {
            for (name, layer) in &model {
                let x = Tensor::eye(layer.weight().dims()[1], DType::F32, &CPU)?;
                let apart = difference(&layer.forward(&x)?.t()?, &expected[name])?;
                assert!(apart < 2e-6, "{case} {name}: {apart}");
            }
            Ok(())
        };
        computes(&merged)?;
        adapter.eval()?;
        computes(&merged)?;
        adapter.train()?;
        let own = adapter.weights()?;
        for (path, layer) in peft::load(folder(case), &CPU)?.layers() {
            let (_, again) = own.layers().find(|(own, _)| *own == path).unwrap();
            assert_eq!(difference(&again.a, &layer.a)?, 0., "{case} {path}");
            assert_eq!(difference(&again.b, &layer.b)?, 0., "{case} {path}");
        }
        // Changed, saved by PEFT's format and this crate's, restored, and merged.
        for var in adapter.named_vars()?.values() {
            var.set(&(var.as_tensor() * 1.5)?)?;
        }
        let expected = merge_into(&base, &adapter.weights()?)?;
        computes(&expected)?;
        let dir = tempfile::tempdir()?;
        for path in [dir.path().join("own.safetensors"), dir.path().join("peft")] {
            match path.extension() {
                Some(_) => adapter.save(&path)?,
                None => adapter.save_pretrained(&path)?,
            }
            let again = merge_into(&base, &Adapter::load(&path, &CPU)?.weights()?)?;
            for (name, tensor) in &again {
                assert_eq!(difference(tensor, &expected[name])?, 0., "{case} {name}");
            }
            let served = layers(&adapter.merged(vb())?, &merged)?;
            for (name, layer) in served {
                assert!(difference(layer.weight(), &expected[&name])? < 2e-6, "{case} {name}");
            }
            assert!(adapter.restore(&path)?.missing.is_empty());
        }
    }
    Ok(())
}

/// A new adapter of parameters, beside one of all linear layers.
#[test]
fn new_factors_of_parameters_start_as_the_base_and_have_one_a_for_two_projections() -> Result<()> {
    for (case, experts, _) in CASES {
        let base = tensors(&format!("{case}.base."))?;
        let cfg = lora::LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
        let names = ["experts.gate_up_proj", "experts.down_proj"];
        let adapter = Adapter::new(cfg).targets("all-linear").target_parameters(names).seed(0);
        let vb = VarBuilder::from_tensors(base.clone().into_iter().collect(), DType::F32, &CPU);
        let model = layers(&adapter.var_builder(vb), &base)?;
        adapter.check()?;
        // Of the query, and for each expert of two parameters.
        assert_eq!(adapter.named_vars()?.len(), 2 + 4 * experts, "{case}");
        let mut sum = Tensor::zeros((), DType::F32, &CPU)?;
        for (name, layer) in &model {
            let x = Tensor::eye(layer.weight().dims()[1], DType::F32, &CPU)?;
            let y = layer.forward(&x)?;
            assert_eq!(difference(&y.t()?, &base[name])?, 0., "{case} {name}");
            sum = (sum + y.sqr()?.sum_all()?)?;
        }
        adapter.require_grads(&sum.backward()?)?;
        let saved = saved_and_loaded(&adapter.weights()?)?;
        let paths: Vec<_> =
            saved.layers().map(|(path, _)| path.rsplit('.').next().unwrap()).collect();
        assert_eq!(paths[..2], ["down_proj", "gate_up_proj"], "{case}");
        assert!(saved
            .layers()
            .all(|(path, layer)| layer.a.dims()[0] == experts || path.contains("q_")));
    }
    Ok(())
}

/// Matrices that stay as they are stored, in half precision.
#[test]
fn parameters_are_trained_over_half_precision_matrices() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (case, ..) in CASES {
        let (file, base) = (dir.path().join(case), tensors(&format!("{case}.base."))?);
        let half = base.iter().map(|(n, t)| Ok((n.clone(), t.to_dtype(DType::BF16)?)));
        let half = half.collect::<Result<std::collections::HashMap<_, _>>>()?;
        candle_core::safetensors::save(&half, &file)?;
        let adapter = Adapter::load(folder(case), &CPU)?;
        let vb = lora::base::half_var_builder(&file, DType::F32, &CPU)?;
        let model = layers(&adapter.var_builder(vb), &base)?;
        adapter.check()?;
        adapter.train()?;
        let rounded = half.iter().map(|(n, t)| Ok((n.clone(), t.to_dtype(DType::F32)?)));
        let expected = merge_into(&rounded.collect::<Result<_>>()?, &adapter.weights()?)?;
        let mut sum = Tensor::zeros((), DType::F32, &CPU)?;
        for (name, layer) in &model {
            assert!(layer.quantized_weight().is_some(), "{case} {name}");
            let y = layer.forward(&Tensor::eye(base[name].dims()[1], DType::F32, &CPU)?)?;
            assert!(difference(&y.t()?, &expected[name])? < 2e-6, "{case} {name}");
            sum = (sum + y.sqr()?.sum_all()?)?;
        }
        adapter.require_grads(&sum.backward()?)?;
    }
    Ok(())
}

/// The fused tensors of a module with three experts, 64 wide with 32 inner, and its matrices one by one.
fn fused_base() -> Result<(StateDict, StateDict)> {
    let module = "model.layers.0.mlp.experts";
    let gate_up = crate::common::randn(&[3, 64, 64], DType::F32, &CPU)?;
    let down = crate::common::randn(&[3, 64, 32], DType::F32, &CPU)?;
    let mut each = StateDict::new();
    for e in 0..3 {
        let both = gate_up.get(e)?;
        let mut put =
            |name: &str, tensor: Tensor| each.insert(format!("{module}.{e}.{name}.weight"), tensor);
        put("gate_proj", both.narrow(0, 0, 32)?);
        put("up_proj", both.narrow(0, 32, 32)?);
        put("down_proj", down.get(e)?);
    }
    let fused =
        [(format!("{module}.gate_up_proj"), gate_up), (format!("{module}.down_proj"), down)];
    Ok((fused.into(), each))
}

#[test]
fn a_base_of_fused_experts_gives_the_matrices_of_each() -> Result<()> {
    let (fused, each) = fused_base()?;
    let vb = |tensors: &StateDict| {
        let tensors = tensors.clone().into_iter().collect();
        lora::base::split_experts(VarBuilder::from_tensors(tensors, DType::F32, &CPU))
    };
    let transposed: StateDict =
        fused.iter().map(|(n, t)| Ok((n.clone(), t.transpose(1, 2)?))).collect::<Result<_>>()?;
    // As llama.cpp has them: gate and up apart, with an end.
    let mut apart = StateDict::new();
    for (name, start) in [("gate_proj", 0), ("up_proj", 32)] {
        let both = &fused["model.layers.0.mlp.experts.gate_up_proj"];
        let name = format!("model.layers.0.mlp.experts.{name}.weight");
        apart.insert(name, both.narrow(1, start, 32)?.contiguous()?);
    }
    apart.insert(
        "model.layers.0.mlp.experts.down_proj.weight".to_owned(),
        fused["model.layers.0.mlp.experts.down_proj"].clone(),
    );
    for base in [&fused, &transposed, &apart] {
        for (name, expected) in &each {
            assert!(vb(base).contains_tensor(name), "{name}");
            assert_eq!(difference(&vb(base).get(expected.shape(), name)?, expected)?, 0., "{name}");
            let mixtral = name.replace("mlp.experts", "block_sparse_moe.experts");
            let mixtral = mixtral.replace("gate_proj", "w1").replace("up_proj", "w3");
            let mixtral = mixtral.replace("down_proj", "w2");
            assert_eq!(difference(&vb(base).get(expected.shape(), &mixtral)?, expected)?, 0.);
        }
    }
    let name = "model.layers.0.mlp.experts.3.up_proj.weight";
    says(vb(&fused).get((32, 64), name), &[name, "has 3 experts"]);
    let name = "model.layers.0.mlp.experts.0.up_proj.weight";
    says(vb(&fused).get((30, 64), name), &[name, "[3, 64, 64]", "[30, 64]"]);
    Ok(())
}

/// PEFT's parameters over a base that has them fused and quantised, and so stay.
#[test]
fn parameters_are_trained_over_fused_quantised_experts() -> Result<()> {
    use candle_core::quantized::{GgmlDType, QTensor};
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q5_1, GgmlDType::BF16] {
        let (fused, each) = fused_base()?;
        let (mut blocks, mut rounded) = (std::collections::HashMap::new(), StateDict::new());
        for (name, tensor) in &fused {
            let quantised = QTensor::quantize(tensor, dtype)?;
            rounded.insert(name.clone(), quantised.dequantize(&CPU)?);
            blocks.insert(name.clone(), std::sync::Arc::new(quantised));
        }
        let cfg = lora::LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
        let names = ["experts.gate_up_proj", "experts.down_proj"];
        let adapter = Adapter::new(cfg).target_parameters(names).seed(0);
        let vb = lora::gguf::var_builder(blocks, DType::F32, &CPU);
        let model = layers(&adapter.var_builder(vb), &each)?;
        adapter.check()?;
        for var in adapter.named_vars()?.values() {
            var.set(&crate::common::randn(var.dims(), DType::F32, &CPU)?)?;
        }
        // A merged base gives the matrices of each expert, too, whichever comes first.
        let names: Vec<_> = each.keys().cloned().collect();
        let quantised = fused.iter().map(|(name, tensor)| {
            Ok((name.clone(), std::sync::Arc::new(QTensor::quantize(tensor, dtype)?)))
        });
        let quantised = quantised.collect::<Result<std::collections::HashMap<_, _>>>()?;
        let dense =
            || VarBuilder::from_tensors(rounded.clone().into_iter().collect(), DType::F32, &CPU);
        let orders = [
            adapter.merged(lora::base::split_experts(dense()))?,
            lora::base::split_experts(adapter.merged(dense())?),
            adapter.merged(lora::gguf::var_builder(quantised, DType::F32, &CPU))?,
        ];
        let all = merge_into(&rounded, &adapter.weights()?)?;
        let all = VarBuilder::from_tensors(all.into_iter().collect(), DType::F32, &CPU);
        let all = lora::base::split_experts(all);
        for (order, vb) in orders.iter().enumerate() {
            for name in &names {
                let shape = each[name].shape();
                let apart = difference(&vb.get(shape, name)?, &all.get(shape, name)?)?;
                assert!(apart < 1e-5, "{dtype:?} {order} {name}: {apart}");
            }
        }
        // Into the base as it is, and into one with a matrix for each expert.
        let merged = merge_into(&rounded, &adapter.weights()?)?;
        let merged = VarBuilder::from_tensors(merged.into_iter().collect(), DType::F32, &CPU);
        let merged = lora::base::split_experts(merged);
        let mut sum = Tensor::zeros((), DType::F32, &CPU)?;
        for (name, layer) in &model {
            assert!(layer.quantized_weight().is_some(), "{dtype:?} {name}");
            let (outs, ins) = each[name].dims2()?;
            let y = layer.forward(&Tensor::eye(ins, DType::F32, &CPU)?)?;
            let apart = difference(&y.t()?, &merged.get((outs, ins), name)?)?;
            assert!(apart < 1e-5, "{dtype:?} {name}: {apart}");
            sum = (sum + y.sqr()?.sum_all()?)?;
        }
        adapter.require_grads(&sum.backward()?)?;
    }
    Ok(())
}

#[test]
fn experts_of_different_ranks_and_scalings_are_fused() -> Result<()> {
    let base = tensors("mixtral.base.")?;
    for rslora in [false, true] {
        let cfg = lora::LoraConfig { r: 2, lora_alpha: 3., rslora, ..Default::default() };
        let (mut config, mut factors) = (AdapterConfig::from(cfg), StateDict::new());
        // Of the first expert the gate and the down projection, of the last all, with ranks and alphas of their own.
        for (i, (expert, name, outs, ins)) in
            [(0, "w1", 6, 8), (0, "w2", 8, 6), (2, "w1", 6, 8), (2, "w3", 6, 8), (2, "w2", 8, 6)]
                .into_iter()
                .enumerate()
        {
            let path = format!("model.layers.0.block_sparse_moe.experts.{expert}.{name}");
            let (r, alpha) = (1 + i % 3, 2. + i as f64);
            let layer = lora::adapter::LayerConfig {
                r: Some(r),
                lora_alpha: Some(alpha),
                ..Default::default()
            };
            config.layers.insert(path.clone(), layer);
            let mut put = |last: &str, dims: [usize; 2]| -> Result<()> {
                let factor = crate::common::randn(dims.as_slice(), DType::F32, &CPU)?;
                factors.insert(format!("{path}.{last}"), factor);
                Ok(())
            };
            put("lora_A", [r, ins])?;
            put("lora_B", [outs, r])?;
        }
        let weights = LoraWeights::new(config, factors)?;
        let expected = merge_into(&base, &weights)?;
        let fused = saved_and_loaded(&weights.fuse_experts(3)?)?;
        assert_eq!(fused.layers().count(), 2);
        for (name, tensor) in merge_into(&base, &fused)? {
            assert!(difference(&tensor, &expected[&name])? < 1e-5, "{rslora} {name}");
        }
    }
    Ok(())
}

/// Expert by expert, as if each were a layer.
#[test]
fn sums_and_other_ranks_of_fused_factors_are_those_of_each_expert() -> Result<()> {
    use lora::merge::{add_weighted, add_weighted_with, AddWeightedConfig, CombinationType};
    for (case, _, names) in CASES {
        let weights = peft::load(folder(case), &CPU)?;
        let split = weights.split_experts(names)?;
        let base = tensors(&format!("{case}.base."))?;
        let same = |fused: &LoraWeights, separate: &LoraWeights| -> Result<()> {
            assert!(fused.layers().any(|(path, _)| path.ends_with("experts.gate_up_proj")));
            let (ours, expected) = (merge_into(&base, fused)?, merge_into(&base, separate)?);
            for (name, tensor) in &ours {
                assert!(difference(tensor, &expected[name])? < 5e-6, "{case} {name}");
            }
            Ok(())
        };
        let sum = |own: &LoraWeights| add_weighted(&[(own, 0.5), (own, -2.)]);
        same(&saved_and_loaded(&sum(&weights)?)?, &sum(&split)?)?;
        let svd =
            AddWeightedConfig { combination_type: CombinationType::Svd, ..Default::default() };
        let sum = add_weighted_with(&[(&weights, 0.5), (&weights, -2.)], &svd)?;
        same(&sum, &add_weighted(&[(&weights, -1.5)])?)?;
        let resized = weights.resized(4)?;
        assert!(resized.kept.values().all(|kept| (kept - 1.).abs() < 1e-9), "{case}");
        same(&resized.weights, &split)?;
        assert_eq!(weights.resized(1)?.weights.layers().count(), weights.layers().count());
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
    let vb = |adapter: &Adapter, base: &StateDict| {
        let base = base.clone().into_iter().collect();
        adapter.var_builder(VarBuilder::from_tensors(base, DType::F32, &CPU))
    };
    // A model without the experts, one with the fused parameter itself, and one of several adapters.
    let adapter = Adapter::from_weights(&fused)?;
    let base = tensors("mixtral.base.")?;
    let _q = linear_no_bias(8, 8, vb(&adapter, &base).pp("model.layers.0.self_attn.q_proj"))?;
    says(adapter.check(), &["mlp.experts.0.", "no such layer"]);
    let parameter = "model.layers.0.mlp.experts.gate_up_proj";
    let whole = [(parameter.to_owned(), Tensor::zeros((3, 12, 8), DType::F32, &CPU)?)].into();
    let read = vb(&adapter, &whole).get((3, 12, 8), parameter);
    says(read, &[parameter, "Adapter::merged"]);
    let set = lora::Adapters::new();
    let base = base.into_iter().collect();
    let vb = set.var_builder(VarBuilder::from_tensors(base, DType::F32, &CPU));
    let _w1 = linear_no_bias(8, 6, vb.pp("model.layers.0.block_sparse_moe.experts.0.w1"))?;
    says(set.add("a", &adapter), &["experts", "split_experts"]);
    let cfg = lora::LoraConfig { r: 2, use_dora: true, ..Default::default() };
    let dora = Adapter::new(cfg).target_parameters(["experts.down_proj"]);
    let w2 = "model.layers.0.block_sparse_moe.experts.0.w2";
    let _w2 = linear_no_bias(6, 8, dora.var_builder(VarBuilder::zeros(DType::F32, &CPU)).pp(w2))?;
    says(dora.check(), &["experts.0.down_proj", "use_dora"]);
    says(dora.vars(), &["experts.0.down_proj", "use_dora"]);
    let none = Adapter::new(lora::LoraConfig { r: 2, ..Default::default() });
    let none = none.targets(["q_proj"]).target_parameters(["experts.scales"]);
    let q = none.var_builder(VarBuilder::zeros(DType::F32, &CPU)).pp("q_proj");
    let _q = linear_no_bias(8, 8, q)?;
    says(none.check(), &["target_parameters has \"experts.scales\"", "gate_up_proj"]);
    Ok(())
}
