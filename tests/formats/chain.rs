//! From format to format and back.

use crate::{assert_same, fixture, tensors, CPU};
use lora::formats::{diffusers, kohya, peft};
use lora::{LoraWeights, Result};
use loralib as lora;
use std::fs;

/// kohya's file as this crate's, PEFT's, diffusers' and kohya's again.
#[test]
fn adapters_pass_through_all_formats_with_their_bits() -> Result<()> {
    let names = fs::read_to_string(fixture("kohya/names.txt"))?;
    let names: Vec<_> = names.lines().collect();
    let dir = tempfile::tempdir()?;
    let to = |file: &str| dir.path().join(file);
    for case in ["kohya/attention", "kohya/conv"] {
        let first = kohya::load(fixture(case).join("lora.safetensors"), &CPU)?;
        let first = kohya::with_paths(&first, &names)?;
        let same = |weights: LoraWeights| -> Result<LoraWeights> {
            assert_same(&weights.state_dict(), &first.state_dict())?;
            for path in first.config().layers.keys() {
                let own = |weights: &LoraWeights| {
                    let config = weights.config();
                    (config.lora_config(path).scaling(), config.kind(path).cloned())
                };
                assert_eq!(own(&weights), own(&first), "{path}");
            }
            Ok(weights)
        };
        lora::save_state_dict(&first.state_dict(), first.config(), to("own"))?;
        let read = lora::read_state_dict(to("own"), &CPU)?;
        let weights = same(LoraWeights::new(read.config.unwrap_or_default(), read.tensors)?)?;
        peft::save(to("peft"), &weights)?;
        let weights = same(peft::load(to("peft"), &CPU)?)?;
        diffusers::save(to("diffusers"), &weights)?;
        let weights = same(diffusers::load(to("diffusers"), &CPU)?)?;
        kohya::save(to("kohya"), &weights)?;
        kohya::save(to("first"), &first)?;
        assert_same(&tensors(&to("kohya"))?, &tensors(&to("first"))?)?;
    }
    Ok(())
}
