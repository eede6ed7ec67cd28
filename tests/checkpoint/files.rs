//! The files that `save_state_dict` writes.

use crate::common::CFG;
use crate::{adapter, fails, CPU};
use candle_core::{DType, Result, Tensor};
use lora::utils::StateDict;
use lora::{Bias, LoraConfig, Strict};
use loralib as lora;
use std::fs;
use std::path::Path;

#[test]
fn equal_contents_give_equal_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_, vars) = adapter(Bias::All)?;
    let state = lora::lora_state_dict(&vars, Bias::All)?;
    let mut seen = std::collections::HashSet::new();
    for i in 0..20 {
        let path = folder.path().join(format!("{i}.safetensors"));
        lora::save_state_dict(&state, CFG, &path)?;
        seen.insert(fs::read(path)?);
    }
    assert_eq!(seen.len(), 1);
    let path = folder.path().join("0.safetensors");
    let read = candle_core::safetensors::load(&path, &CPU)?;
    assert_eq!(read.len(), state.len());
    // A file of another program has no configuration to compare, and loads.
    let plain = folder.path().join("plain.safetensors");
    candle_core::safetensors::save(&read, &plain)?;
    assert_eq!(lora::read_state_dict(&plain, &CPU)?.config, None);
    let report = lora::load_checkpoint(&plain, &vars, CFG, Strict::Yes)?;
    assert_eq!(report.loaded.len(), state.len());
    Ok(())
}

#[test]
fn alpha_and_dropout_are_stored_exactly() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.safetensors");
    let (_, vars) = adapter(Bias::None)?;
    let state = lora::lora_state_dict(&vars, Bias::None)?;
    for i in 1..200 {
        let lora_alpha = 16. * f64::from(i).sqrt();
        let cfg = LoraConfig { lora_alpha, lora_dropout: 1. / (i + 1) as f32, ..CFG };
        lora::save_state_dict(&state, cfg, &path)?;
        assert_eq!(lora::read_state_dict(&path, &CPU)?.config, Some(cfg.into()));
    }
    Ok(())
}

#[cfg(unix)]
#[test]
fn save_keeps_permissions_and_links() -> Result<()> {
    use std::os::unix::fs::{symlink, PermissionsExt};
    let folder = tempfile::tempdir()?;
    let (_, vars) = adapter(Bias::None)?;
    let state = lora::lora_state_dict(&vars, Bias::None)?;
    let path = folder.path().join("a.safetensors");
    let mode = |path: &Path| fs::metadata(path).map(|m| m.permissions().mode() & 0o777);
    fs::write(folder.path().join("any"), "")?;
    lora::save_state_dict(&state, CFG, &path)?;
    assert_eq!(mode(&path)?, mode(&folder.path().join("any"))?, "the mode of any new file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
    let link = folder.path().join("link");
    symlink("a.safetensors", &link)?;
    lora::save_state_dict(&state, CFG, &link)?;
    assert_eq!(mode(&path)?, 0o640);
    assert!(fs::symlink_metadata(&link)?.file_type().is_symlink());
    assert_eq!(fs::read_dir(folder.path())?.count(), 3);
    let nowhere = folder.path().join("none/a.safetensors");
    fails(lora::save_state_dict(&state, CFG, &nowhere), &["none/a.safetensors"]);
    Ok(())
}

#[test]
fn invalid_state_is_not_saved() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.safetensors");
    fails(lora::save_state_dict(&StateDict::new(), CFG, &path), &["a.safetensors", "empty"]);
    let nan = StateDict::from([
        ("q.lora_A".to_owned(), Tensor::full(f32::NAN, (2, 4), &CPU)?),
        ("q.lora_B".to_owned(), Tensor::zeros((4, 2), DType::F32, &CPU)?),
    ]);
    fails(lora::save_state_dict(&nan, CFG, &path), &["a.safetensors", "q.lora_A", "finite"]);
    let (_, vars) = adapter(Bias::None)?;
    let mut state = lora::lora_state_dict(&vars, Bias::None)?;
    let other = LoraConfig { r: 3, ..CFG };
    fails(lora::save_state_dict(&state, other, &path), &["q.lora_A", "rank is 2", "r = 3"]);
    let nan = LoraConfig { lora_alpha: f64::NAN, ..CFG };
    fails(lora::save_state_dict(&state, nan, &path), &["lora_alpha is NaN"]);
    state.insert("__metadata__".to_owned(), Tensor::zeros(1, DType::F32, &CPU)?);
    fails(lora::save_state_dict(&state, CFG, &path), &["__metadata__"]);
    state.remove("__metadata__");
    fails(lora::save_state_dict(&state, CFG, folder.path()), &["is not a file"]);
    assert!(!path.exists());
    Ok(())
}
