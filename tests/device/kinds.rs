//! The kind of a layer as a value, as an `AdapterConfig` has it.

use crate::common::{device, CFG};
use candle_core::{DType, Result};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};
use lora::layers::{Conv3dConfig, LayerKind};
use lora::LoraConfig;
use loralib as lora;

fn vb() -> VarBuilder<'static> {
    VarBuilder::zeros(DType::F32, &device())
}

#[test]
fn every_layer_has_its_kind() -> Result<()> {
    // Also without an adapter.
    for cfg in [CFG, LoraConfig { r: 0, ..CFG }] {
        let transposed = LoraConfig { fan_in_fan_out: true, ..cfg };
        assert_eq!(lora::linear(4, 6, cfg, vb())?.kind(), LayerKind::Linear);
        assert_eq!(lora::linear(4, 6, transposed, vb())?.kind(), LayerKind::Linear);
        assert_eq!(lora::embedding(4, 6, cfg, vb())?.kind(), LayerKind::Embedding);
        let qv = lora::merged_linear(4, 6, &[true, false, true], cfg, vb())?;
        assert_eq!(qv.kind(), LayerKind::MergedLinear(vec![true, false, true]));
        for groups in [1, 2] {
            let one = Conv1dConfig { groups, ..Default::default() };
            let two = Conv2dConfig { groups, ..Default::default() };
            let three = Conv3dConfig { groups, ..Default::default() };
            let kind = lora::conv1d(4, 6, 3, one, cfg, vb())?.kind();
            assert_eq!(kind, LayerKind::Conv1d { groups });
            let kind = lora::conv2d(4, 6, 3, two, cfg, vb())?.kind();
            assert_eq!(kind, LayerKind::Conv2d { groups });
            let kind = lora::conv3d(4, 6, 3, three, cfg, vb())?.kind();
            assert_eq!(kind, LayerKind::Conv3d { groups });
        }
    }
    Ok(())
}

#[test]
fn splits_give_the_kind_of_a_merged_linear() -> Result<()> {
    let equal = lora::merged_linear(4, 9, &[false, true, true], CFG, vb())?;
    assert_eq!(equal.splits(), [(3, false), (3, true), (3, true)]);
    let with_splits = |splits: &[(usize, bool)]| {
        let base = candle_nn::linear(4, 9, vb())?;
        lora::MergedLinear::with_splits(base, splits, CFG, vb())
    };
    let unequal = [(4, true), (2, false), (3, true)];
    let layer = with_splits(&unequal)?;
    assert_eq!(layer.splits(), unequal);
    assert_eq!(layer.kind(), LayerKind::MergedSplits(unequal.to_vec()));
    let layer = with_splits(&[(3, false), (3, true), (3, true)])?;
    assert_eq!(layer.kind(), equal.kind());
    Ok(())
}
