//! Seeded initial values are the same on every device.

use crate::common::{bits, device};
use candle_core::{DType, Device, Result};
use candle_nn::{Init, VarBuilder, VarMap};
use loralib as lora;

#[test]
fn seeded_values_are_the_same_on_every_device() -> Result<()> {
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        for init in [Init::Uniform { lo: -1., up: 3. }, Init::Randn { mean: 0., stdev: 1. }] {
            let start = |device: &Device| {
                let vb = VarBuilder::from_varmap(&VarMap::new(), dtype, device);
                lora::base::seeded(vb, 1).get_with_hints((64, 33), "a", init)
            };
            let tensor = start(&device())?;
            assert!(tensor.device().same_device(&device()) && tensor.dtype() == dtype);
            assert_eq!(bits(&tensor)?, bits(&start(&Device::Cpu)?)?, "{dtype:?} {init:?}");
        }
    }
    Ok(())
}
