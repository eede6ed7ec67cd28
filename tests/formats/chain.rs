//! From format to format and back.

use crate::{assert_same, fixture, tensors, Adapter, CPU};
use lora::formats::{diffusers, kohya};
use lora::{peft, Result};
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
        let first = kohya::load(fixture(case).join("lora.safetensors"), &names, &CPU)?;
        let same = |(config, adapter): Adapter| -> Result<Adapter> {
            assert_same(&adapter, &first.1)?;
            for path in first.0.layers.keys() {
                let own = |config: &lora::AdapterConfig| {
                    (config.lora_config(path).scaling(), config.kind(path).cloned())
                };
                assert_eq!(own(&config), own(&first.0), "{path}");
            }
            Ok((config, adapter))
        };
        lora::save_state_dict(&first.1, &first.0, to("own"))?;
        let (config, adapter) = lora::read_adapter(to("own"), &CPU)?;
        let (config, adapter) = same((config.unwrap_or_default(), adapter))?;
        peft::save_pretrained(to("peft"), &adapter, &config)?;
        let (config, adapter) = same(peft::load_pretrained(to("peft"), &CPU)?)?;
        diffusers::save(to("diffusers"), &adapter, &config)?;
        let (config, adapter) = same(diffusers::load(to("diffusers"), &CPU)?)?;
        kohya::save(to("kohya"), &adapter, &config)?;
        kohya::save(to("first"), &first.1, &first.0)?;
        assert_same(&tensors(&to("kohya"))?, &tensors(&to("first"))?)?;
    }
    Ok(())
}
