//! State dicts that `torch.save` wrote (`fixtures/checkpoints.py`).

use candle_core::{DType, Device, Tensor};
use loralib as lora;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch").join(name)
}

fn read(name: &str) -> lora::Result<lora::utils::StateDict> {
    Ok(lora::read_state_dict(path(name), &Device::Cpu)?.tensors)
}

fn flat(t: &Tensor) -> candle_core::Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn assert_same(torch: &str, safetensors: &str) -> lora::Result<usize> {
    let (torch, safetensors) = (read(torch)?, read(safetensors)?);
    assert!(torch.keys().eq(safetensors.keys()));
    for (name, tensor) in &torch {
        let expected = &safetensors[name];
        assert_eq!(tensor.dims(), expected.dims(), "{name}");
        assert_eq!(tensor.dtype(), expected.dtype(), "{name}");
        assert_eq!(flat(tensor)?, flat(expected)?, "{name}");
    }
    Ok(torch.len())
}

#[test]
fn loralib_state_dicts_are_read() -> lora::Result<()> {
    assert_eq!(assert_same("loralib_none.pt", "loralib_none.safetensors")?, 8);
    assert_eq!(assert_same("loralib_all.pt", "loralib_all.safetensors")?, 11);
    Ok(())
}

#[test]
fn dtypes_and_strides_are_read() -> lora::Result<()> {
    assert_eq!(assert_same("good.pt", "good.safetensors")?, 15);
    Ok(())
}

#[test]
fn format_is_detected_from_the_content() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let named = dir.path().join("weights.safetensors");
    std::fs::copy(path("good.pt"), &named)?;
    assert_eq!(lora::read_state_dict(&named, &Device::Cpu)?.tensors.len(), 15);
    let named = dir.path().join("weights.pt");
    std::fs::copy(path("good.safetensors"), &named)?;
    assert_eq!(lora::read_state_dict(&named, &Device::Cpu)?.tensors.len(), 15);
    Ok(())
}

#[test]
fn errors_name_the_file_and_entry() {
    let entries = [
        "bool", "complex", "gaps", "expanded", "number", "nested", "list", "nan", "negated",
        "sparse", "f8",
    ];
    for entry in entries {
        let file = format!("bad_{entry}.pt");
        let error = read(&file).expect_err(entry).to_string();
        assert!(error.contains(&file) && error.contains(&format!("the {entry}")), "{error}");
    }
    let error = read("bad_f8.pt").expect_err("f8").to_string();
    assert!(error.contains("float8_e4m3fn") && error.contains(".float()"), "{error}");
    for file in ["bad_tensor.pt", "bad_legacy.pt"] {
        let error = read(file).expect_err(file).to_string();
        assert!(error.contains(file), "{error}");
    }
}
