//! PEFT folders for programs that take `lora_alpha / r` for every layer.

use crate::common::{difference, rnd};
use crate::{assert_same, tensors, CPU};
use candle_core::DType;
use lora::adapter::{AdapterConfig, LayerConfig};
use lora::formats::peft;
use lora::layers::LayerKind;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;
use std::fs;

fn sample(lora: LoraConfig) -> lora::Result<(StateDict, LoraWeights)> {
    let (mut base, mut adapter) = (StateDict::new(), StateDict::new());
    for (i, (path, r)) in [("h.q", 2), ("h.k", 2), ("h.v", 5)].into_iter().enumerate() {
        let value =
            |k: u64, shape: &[usize]| rnd(10 * i as u64 + k, shape, DType::F32)?.to_device(&CPU);
        base.insert(format!("{path}.weight"), value(1, &[6, 4])?);
        adapter.insert(format!("{path}.lora_A"), value(2, &[r, 4])?);
        adapter.insert(format!("{path}.lora_B"), value(3, &[6, r])?);
    }
    let mut config = AdapterConfig::from(lora).with_layer("q", LayerKind::Linear);
    let own = LayerConfig { r: Some(5), lora_alpha: Some(0.75), ..Default::default() };
    config.layers.insert("v".to_owned(), own);
    Ok((base, LoraWeights::new(config, adapter)?))
}

#[test]
fn plain_folders_have_one_rank_one_whole_alpha_and_the_same_update() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    for (lora_alpha, rslora) in [(3., false), (3., true), (0.3, false), (-5.5, true), (0., false)] {
        let lora = LoraConfig { r: 2, lora_alpha, rslora, ..Default::default() };
        let (base, weights) = sample(lora)?;
        peft::save_plain(dir.path(), &weights)?;
        let text = fs::read_to_string(dir.path().join("adapter_config.json"))?;
        for line in [
            r#""use_rslora": false"#,
            r#""r": 5"#,
            r#""rank_pattern": {}"#,
            r#""alpha_pattern": {}"#,
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let again = peft::load(dir.path(), &CPU)?;
        let read = again.config();
        assert!(read.lora.lora_alpha.fract() == 0. && read.lora.lora_alpha != 0., "{read:?}");
        let expected = merge_into(&base, &weights)?;
        for (name, merged) in merge_into(&base, &again)? {
            let apart = difference(&merged, &expected[&name])?;
            assert!(apart <= 2e-6, "{lora_alpha} {rslora} {name}: {apart}");
        }
    }
    Ok(())
}

#[test]
fn factors_keep_their_bits_where_the_scaling_fits() -> lora::Result<()> {
    let dirs = [tempfile::tempdir()?, tempfile::tempdir()?];
    let lora = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    let (_, all) = sample(lora)?;
    let adapter = all.state_dict().into_iter().filter(|(name, _)| !name.contains('v')).collect();
    let weights = LoraWeights::new(lora, adapter)?;
    peft::save_plain(dirs[0].path(), &weights)?;
    peft::save(dirs[1].path(), &weights)?;
    let [plain, usual] =
        dirs.each_ref().map(|dir| tensors(&dir.path().join("adapter_model.safetensors")));
    assert_same(&plain?, &usual?)
}
