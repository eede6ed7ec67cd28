//! One layer over a file, beside its adapter and merged.

use crate::common::randn;
use crate::{largest, CPU};
use candle_core::quantized::gguf_file::{write, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Module, Tensor};
use lora::utils::StateDict;
use lora::{gguf, Adapter, Bias, LoraConfig, LoraWeights};
use loralib as lora;
use std::fs;
use std::path::{Path, PathBuf};

/// A file of a llama with one weight.
fn base(dir: &Path) -> PathBuf {
    let path = dir.join("base.gguf");
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.block_count", Value::U32(1)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let weight = randn((8, 32), DType::F32, &CPU).unwrap();
    let weight = QTensor::quantize(&weight, GgmlDType::Q8_0).unwrap();
    let mut file = fs::File::create(&path).unwrap();
    write(&mut file, &metadata, &[("blk.0.attn_q.weight", &weight)]).unwrap();
    path
}

fn factors() -> StateDict {
    let factor = |dims: (usize, usize)| randn(dims, DType::F32, &CPU).unwrap();
    StateDict::from([
        ("model.layers.0.self_attn.q_proj.lora_A".to_owned(), factor((4, 32))),
        ("model.layers.0.self_attn.q_proj.lora_B".to_owned(), factor((8, 4))),
    ])
}

#[test]
fn an_adapter_in_llama_cpp_s_form_is_the_same_adapter() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let base = gguf::File::open(base(dir.path()))?;
    let cfg = LoraConfig { r: 4, lora_alpha: 12., ..Default::default() };
    let path = dir.path().join("adapter.gguf");
    let factors = factors();
    gguf::save_adapter(&path, &LoraWeights::new(cfg, factors.clone())?, &base)?;
    let loaded = Adapter::load_gguf(&path, &base, &CPU)?;
    assert_eq!(loaded.config().lora, cfg);
    let tensors = lora::lora_state_dict(loaded.var_map(), Bias::None)?;
    assert!(tensors.keys().eq(factors.keys()));
    for (name, tensor) in &factors {
        assert_eq!(tensors[name].to_vec2::<f32>()?, tensor.to_vec2::<f32>()?, "{name}");
    }
    let again = dir.path().join("again.gguf");
    loaded.save_gguf(&again, &base)?;
    assert_eq!(fs::read(&path)?, fs::read(&again)?);
    Ok(())
}

#[test]
fn a_layer_computes_the_same_beside_its_adapter_and_merged() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = gguf::File::open(base(dir.path()))?;
    let (path, merged) = (dir.path().join("adapter.gguf"), dir.path().join("merged.gguf"));
    let cfg = LoraConfig { r: 4, lora_alpha: 12., ..Default::default() };
    let factors = factors();
    gguf::save_adapter(&path, &LoraWeights::new(cfg, factors.clone())?, &file)?;

    let layer = |vb: lora::nn::VarBuilder| {
        lora::nn::linear_no_bias(32, 8, vb.pp("model.layers.0.self_attn.q_proj"))
    };
    let x = randn((3, 32), DType::F32, &CPU)?;
    let alone = layer(file.var_builder(DType::F32, &CPU)?)?.forward(&x)?;
    // The rows of a head of 4: 0 and 2 are neighbours in the file.
    let stored = file.tensor("blk.0.attn_q.weight", &CPU)?.dequantize(&CPU)?;
    let rows = Tensor::new(&[0u32, 2, 1, 3, 4, 6, 5, 7], &CPU)?;
    let weight = stored.index_select(&rows, 0)?;
    assert!(largest(&(&alone - x.matmul(&weight.t()?)?)?) < 1e-5);

    let adapter = Adapter::load_gguf(&path, &file, &CPU)?;
    let adapted = layer(adapter.var_builder(file.var_builder(DType::F32, &CPU)?))?;
    adapter.check()?;
    let beside = adapted.forward(&x)?;
    let [a, b] = ["lora_A", "lora_B"]
        .map(|last| &factors[&format!("model.layers.0.self_attn.q_proj.{last}")]);
    let update = (x.matmul(&a.t()?)?.matmul(&b.t()?)? * cfg.scaling())?;
    assert!(largest(&(&beside - (alone + update)?)?) < 1e-4);

    gguf::merge(&file, &adapter.weights()?, &merged, GgmlDType::F32, |_| {})?;
    let merged = gguf::File::open(&merged)?.var_builder(DType::F32, &CPU)?;
    assert!(largest(&(layer(merged)?.forward(&x)? - beside)?) < 1e-4);
    Ok(())
}
