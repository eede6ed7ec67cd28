//! The contract for the convolutions, against candle's own in one and two dimensions.

use super::{check_with_dora, Case};
use crate::common::{rnd, CFG};
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig};
use lora::layers::Conv3dConfig;
use loralib as lora;

/// candle's convolutions do not support BF16 on the CPU: computes in F64.
fn in_f64(
    weight: &Tensor,
    bias: Option<&Tensor>,
    x: &Tensor,
    run: impl Fn(Tensor, Option<Tensor>, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let bias = bias.map(|b| b.to_dtype(DType::F64)).transpose()?;
    run(weight.to_dtype(DType::F64)?, bias, &x.to_dtype(DType::F64)?)?.to_dtype(x.dtype())
}

/// (padding, stride, dilation, k, bias)
const OPTIONS: [(usize, usize, usize, usize, bool); 5] = [
    (0, 1, 1, 3, true),
    (1, 2, 1, 3, false),
    (2, 1, 2, 2, true),
    (3, 2, 3, 3, true),
    (0, 1, 1, 1, true),
];

#[test]
fn convolutions() -> Result<()> {
    for groups in [1, 2] {
        for (padding, stride, dilation, k, bias) in OPTIONS {
            let name = |n| format!("Conv{n}d k {k} g {groups} p {padding} s {stride} d {dilation}");
            let bias_len = bias.then_some(6);
            let one = Conv1dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            let new = if bias { lora::conv1d } else { lora::conv1d_no_bias };
            check_with_dora(&Case {
                name: &name(1),
                weight: &[6, 4 / groups, k],
                bias: bias_len,
                input: &rnd(3, &[2, 4, 7], DType::F64)?,
                cfg: CFG,
                make: &|cfg, vb| new(4, 6, k, one, cfg, vb),
                plain: &|layer, x| {
                    let l = layer.into_merged()?;
                    in_f64(l.weight(), l.bias(), x, |w, b, x| {
                        candle_nn::Conv1d::new(w, b, one).forward(x)
                    })
                },
            })?;
            let two = Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            let new = if bias { lora::conv2d } else { lora::conv2d_no_bias };
            check_with_dora(&Case {
                name: &name(2),
                weight: &[6, 4 / groups, k, k],
                bias: bias_len,
                input: &rnd(3, &[2, 4, 7, 6], DType::F64)?,
                cfg: CFG,
                make: &|cfg, vb| new(4, 6, k, two, cfg, vb),
                plain: &|layer, x| {
                    let l = layer.into_merged()?;
                    in_f64(l.weight(), l.bias(), x, |w, b, x| {
                        candle_nn::Conv2d::new(w, b, two).forward(x)
                    })
                },
            })?;
            let three = Conv3dConfig { padding, stride, dilation, groups };
            let new = if bias { lora::conv3d } else { lora::conv3d_no_bias };
            check_with_dora(&Case {
                name: &name(3),
                weight: &[6, 4 / groups, k, k, k],
                bias: bias_len,
                input: &rnd(3, &[2, 4, 5, 6, 4], DType::F64)?,
                cfg: CFG,
                make: &|cfg, vb| new(4, 6, k, three, cfg, vb),
                plain: &|layer, x| layer.into_merged()?.forward(x),
            })?;
        }
    }
    Ok(())
}
