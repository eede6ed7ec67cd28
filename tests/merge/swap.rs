//! Adapters of one model that are exchanged.

use crate::common::bits;
use crate::{cfg, tensor, CPU};
use candle_core::DType;
use candle_nn::VarBuilder;
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraModule, LoraWeights};
use loralib as lora;

#[test]
fn swapped_adapter_takes_effect_at_eval() -> lora::Result<()> {
    let vars = candle_nn::VarMap::new();
    let base = VarBuilder::zeros(DType::F32, &CPU);
    let mut layer =
        lora::linear_no_bias(4, 5, cfg(), lora::var_builder(base, &vars, lora::Bias::None))?;
    for seed in [1, 2] {
        let adapter = StateDict::from([
            ("lora_A".to_owned(), tensor(seed, &[2, 4], DType::F32)),
            ("lora_B".to_owned(), tensor(seed + 9, &[5, 2], DType::F32)),
        ]);
        let report = lora::load_state_dict(&vars, &adapter, lora::Strict::Yes)?;
        assert_eq!(report.loaded.len(), 2);
        layer.eval()?;
        let base = StateDict::from([("weight".to_owned(), layer.weight().clone())]);
        let merged = merge_into(&base, &LoraWeights::new(cfg(), adapter)?)?;
        assert_eq!(bits(&layer.merged_weight()?)?, bits(&merged["weight"])?);
    }
    Ok(())
}

/// `cargo test --release --test merge -- --ignored --nocapture` prints how long a swap takes.
#[test]
#[ignore = "a measurement"]
fn time_to_swap_an_adapter() -> lora::Result<()> {
    let (vars, dim) = (candle_nn::VarMap::new(), 1024);
    let base = VarBuilder::zeros(DType::F32, &CPU);
    let vb = lora::var_builder(base, &vars, lora::Bias::None);
    let cfg = LoraConfig { r: 8, ..cfg() };
    let mut layers = vec![];
    for i in 0..12 {
        layers.push(lora::merged_linear_no_bias(
            dim,
            3 * dim,
            &[true, false, true],
            cfg,
            vb.pp(format!("{i}.qkv")),
        )?);
    }
    let adapter = lora::lora_state_dict(&vars, lora::Bias::None)?;
    layers.eval()?;
    let start = std::time::Instant::now();
    for _ in 0..5 {
        let _ = lora::load_state_dict(&vars, &adapter, lora::Strict::Yes)?;
        layers.eval()?;
    }
    println!("a swap takes {:?}", start.elapsed() / 5);
    Ok(())
}
