//! A file in one format given to a function for the other: the error names the right function.

use crate::common::CFG;
use crate::{adapter, fails, Model, CPU};
use candle_core::DType;
use candle_nn::{VarBuilder, VarMap};
use lora::formats::peft;
use lora::{Bias, LoraWeights, Strict};
use loralib as lora;

#[test]
fn errors_name_the_right_function() -> lora::Result<()> {
    let dir = tempfile::tempdir()?;
    let (file, folder) = (dir.path().join("adapter.safetensors"), dir.path().join("peft"));
    let (_, vars) = adapter(Bias::None)?;
    let state = lora::lora_state_dict(&vars, Bias::None)?;
    lora::save_state_dict(&state, CFG, &file)?;
    peft::save(&folder, &LoraWeights::new(CFG, state)?)?;

    let right = ["`Adapter::load`", "`formats::peft::load`"];
    fails(lora::read_state_dict(&folder, &CPU), &right);
    fails(lora::load_checkpoint(&folder, &vars, CFG, Strict::No), &right);
    let inside = folder.join("adapter_model.safetensors");
    let named = [right[0], right[1], "base_model.model.q.lora_A.weight"];
    fails(lora::load_checkpoint(&inside, &vars, CFG, Strict::No), &named);
    let raw = lora::read_state_dict(&inside, &CPU)?.tensors;
    for strict in [Strict::Yes, Strict::No] {
        fails(lora::load_state_dict(&vars, &raw, strict), &named);
    }

    fails(peft::load(&file, &CPU), &["adapter.safetensors", "`load_checkpoint`"]);
    std::fs::copy(&file, &inside)?;
    fails(peft::load(&folder, &CPU), &["q.lora_A", "`load_checkpoint`"]);
    let base = dir.path().join("base.safetensors");
    let all = VarMap::new();
    Model::new(VarBuilder::from_varmap(&all, DType::F32, &CPU))?;
    all.data().lock().unwrap().retain(|name, _| !name.contains("lora_"));
    all.save(&base)?;
    let named = ["base.safetensors", "LoRA adapter", "k.bias", "`load_state_dict`"];
    fails(lora::load_checkpoint(&base, &vars, CFG, Strict::No), &named);
    let nowhere = dir.path().join("nowhere");
    fails(peft::load(&nowhere, &CPU), &["nowhere", "No such file"]);
    Ok(())
}
