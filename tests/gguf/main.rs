//! GGUF files by the public interface.

use candle_core::quantized::gguf_file::{write, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use lora::{gguf, Adapter, Bias, LoraConfig, StateDict};
use loralib as lora;
use std::fs;
use std::path::{Path, PathBuf};

const CPU: Device = Device::Cpu;

/// A file of a llama with one weight.
fn base(dir: &Path) -> PathBuf {
    let path = dir.join("base.gguf");
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.block_count", Value::U32(1)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let weight = Tensor::ones((8, 32), DType::F32, &CPU).unwrap();
    let weight = QTensor::quantize(&weight, GgmlDType::Q8_0).unwrap();
    let mut file = fs::File::create(&path).unwrap();
    write(&mut file, &metadata, &[("blk.0.attn_q.weight", &weight)]).unwrap();
    path
}

fn factors() -> StateDict {
    let factor = |dims: (usize, usize)| Tensor::randn(0f32, 1., dims, &CPU).unwrap();
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
    gguf::save_adapter(&path, &factors, cfg, &base)?;
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
