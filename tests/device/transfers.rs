//! Training and merging on a GPU copy nothing of the base's size to the host.
//!
//! candle does not count copies, so that `tests/cuda.sh` runs these with `to_host.c`, which ends a program
//! at a larger copy to the host than allowed.

use crate::common::{device, rnd, values};
use candle_core::{DType, Module, Result};
use candle_nn::{AdamW, Conv2dConfig, Optimizer, VarBuilder, VarMap};
use lora::{LoraConfig, LoraModule};
use loralib as lora;
use std::io::Write;

/// Each base weight has 2 MiB or more.
const DIM: usize = 1024;

#[test]
fn steps_and_merges_leave_the_base_on_the_device() -> Result<()> {
    if device().is_cpu() {
        let _ = writeln!(std::io::stderr(), "{}: skipped, no GPU", module_path!());
        return Ok(());
    }
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let cfg = LoraConfig { r: 4, lora_alpha: 8., lora_dropout: 0.1, ..Default::default() };
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &device());
        let no_dropout = LoraConfig { lora_dropout: 0., ..cfg };
        let mut table = lora::embedding(DIM, DIM, no_dropout, vb.pp("table"))?;
        let mut dense = lora::linear(DIM, DIM, cfg, vb.pp("dense"))?;
        let enable = [true, false, true];
        let mut merged = lora::merged_linear_no_bias(DIM, 3 * DIM, &enable, cfg, vb.pp("qkv"))?;
        let conv_cfg = Conv2dConfig { padding: 1, ..Default::default() };
        let mut conv = lora::conv2d_no_bias(DIM / 4, DIM, 2, conv_cfg, cfg, vb.pp("conv"))?;

        let ids = rnd(1, &[2, 12], DType::F32)?.abs()?.affine(DIM as f64 - 1., 0.)?;
        let ids = ids.to_dtype(DType::U32)?;
        let mut forward = |mode| {
            table.set_mode(mode)?;
            dense.set_mode(mode)?;
            merged.set_mode(mode)?;
            conv.set_mode(mode)?;
            let x = merged.forward(&dense.forward(&table.forward(&ids)?)?)?;
            conv.forward(&x.reshape((2, DIM / 4, 12, 12))?)?.to_dtype(DType::F32)?.sqr()?.mean_all()
        };
        let trained = lora::mark_only_lora_as_trainable(&vars, lora::Bias::None)?;
        let mut optimizer = AdamW::new_lr(trained, 1e-3)?;
        for _ in 0..3 {
            optimizer.backward_step(&forward(lora::Mode::Train)?)?;
        }
        let loss = values(&forward(lora::Mode::Eval)?)?;
        assert!(loss.iter().all(|loss| loss.is_finite()), "{loss:?} in {dtype:?}");
    }
    Ok(())
}

/// `to_host.c` must end this one, or it does not see the copies.
#[test]
#[ignore = "copies more than `to_host.c` allows"]
fn a_copy_of_the_base_s_size() -> Result<()> {
    values(&rnd(1, &[DIM, DIM], DType::F32)?).map(drop)
}
