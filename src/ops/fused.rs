//! Chooses between a fused row operation and one composed of candle's operations.

use candle_core::{DType, Device, Result, Tensor};

/// `fused` on the CPU in F32, to which half precision is converted; `composed` for other dtypes and
/// devices, and for empty tensors. `x` is contiguous for `fused`.
pub(super) fn fused_or_composed(
    x: &Tensor,
    fused: impl FnOnce(&Tensor) -> Result<Tensor>,
    composed: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    match (x.device(), x.dtype()) {
        (Device::Cpu, DType::F32) if x.elem_count() > 0 && x.rank() > 0 => fused(&x.contiguous()?),
        (Device::Cpu, dtype @ (DType::F16 | DType::BF16)) if x.elem_count() > 0 && x.rank() > 0 => {
            fused(&x.to_dtype(DType::F32)?.contiguous()?)?.to_dtype(dtype)
        }
        _ => composed(x),
    }
}
