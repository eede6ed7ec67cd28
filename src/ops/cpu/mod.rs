//! The CPU's backend: GEMM by faer where it is available, low-rank terms added in place.

mod adamw;
pub(super) mod attention;
mod buffer;
mod decode;
#[cfg(all(
    feature = "faer",
    target_arch = "x86_64",
    not(any(feature = "mkl", feature = "accelerate"))
))]
mod gemm;
#[cfg(not(all(
    feature = "faer",
    target_arch = "x86_64",
    not(any(feature = "mkl", feature = "accelerate"))
)))]
#[path = "gemm_without_faer.rs"]
mod gemm;
mod gemv;
mod low_rank;
mod rows;

use crate::ops::backend::{
    add_low_rank_by_passes, candle_gemm, candle_round_to, dequantized_gemm, Backend, LowRankTerm,
};
use crate::ops::matrix::Quantized;
use crate::ops::place::is_composed;
use candle_core::{bail, CpuStorage, DType, Layout, Result, Shape, Storage, Tensor};

pub(super) use adamw::{AdamWMoment, AdamWUpdate};
pub(super) use buffer::{add_assign, filled};
pub(super) use gemm::{gemm_into, FUSED_ATTENTION};
pub(super) use low_rank::Float;
pub(super) use rows::{
    exp_nonpositive, f32_slices, map_rows, map_tensor_rows, max, on_cpu, row_squares, sum,
    sum_of_products,
};

impl Backend for CpuStorage {
    fn of(storage: &Storage) -> Result<&Self> {
        match storage {
            Storage::Cpu(s) => Ok(s),
            s => bail!("an operand is on {:?}, expected the CPU", s.device().location()),
        }
    }

    fn gemm(&self, l: &Layout, rhs: &Self, rl: &Layout) -> Result<Self> {
        match (!is_composed()).then(|| gemm::gemm((self, l), (rhs, rl))).flatten() {
            Some(y) => Ok(y),
            None => candle_gemm(self, l, rhs, rl),
        }
    }

    fn gemm_quantized(&self, l: &Layout, rhs: &Quantized) -> Result<Self> {
        if is_composed() {
            return dequantized_gemm(self, l, rhs);
        }
        if let Some(y) = gemv::gemm_quantized(self, l, rhs)? {
            return Ok(y);
        }
        match gemm::gemm_quantized((self, l), rhs)? {
            Some(y) => Ok(y),
            None => dequantized_gemm(self, l, rhs),
        }
    }

    fn round_to(self, shape: &Shape, dtype: DType) -> Result<Self> {
        match (&self, dtype) {
            _ if is_composed() => candle_round_to(self, shape, dtype),
            (CpuStorage::F32(y), DType::BF16) => Ok(CpuStorage::BF16(low_rank::to_half(y))),
            (CpuStorage::F32(y), DType::F16) => Ok(CpuStorage::F16(low_rank::to_half(y))),
            _ => candle_round_to(self, shape, dtype),
        }
    }

    fn add_low_rank(
        mut self,
        dims: (usize, usize),
        bias: Option<&Tensor>,
        terms: &[LowRankTerm],
    ) -> Result<Self> {
        match &mut self {
            _ if is_composed() => return add_low_rank_by_passes(self, dims, bias, terms),
            CpuStorage::F32(y) => low_rank::add(y, dims.1, bias, terms)?,
            CpuStorage::F64(y) => low_rank::add(y, dims.1, bias, terms)?,
            CpuStorage::F16(y) => low_rank::add(y, dims.1, bias, terms)?,
            CpuStorage::BF16(y) => low_rank::add(y, dims.1, bias, terms)?,
            _ => return add_low_rank_by_passes(self, dims, bias, terms),
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::op::compute_dtype;
    use crate::random::normal;
    use candle_core::{backend::BackendStorage, WithDType};

    /// The CPU's implementation against the one of other devices, on values up to about 30: they differ
    /// by rounding alone.
    #[test]
    fn in_place_and_by_passes_agree() -> Result<()> {
        let (m, n) = (7, 10);
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-4), (DType::BF16, 0.5)] {
            let rand = |dims: (usize, usize), dtype| normal(dims)?.to_dtype(dtype);
            let y = rand((m, n), dtype)?;
            // The CPU's GEMM of half-precision operands is in F32, beside a bias in half precision.
            let bias = rand((1, n), if dtype == DType::F32 { DType::BF16 } else { dtype })?;
            let bias = bias.flatten_all()?;
            let mut terms = vec![];
            for (rows, cols, k) in [(0..m, 0..n, 3), (2..5, 0..n, 40), (0..m, 4..9, 1)] {
                let u = rand((rows.len(), k), compute_dtype(dtype))?;
                let v = rand((cols.len(), k), compute_dtype(dtype))?.t()?;
                terms.push(LowRankTerm { u, v, rows, cols });
            }
            let sum = |by_passes| {
                let (storage, _) = y.storage_and_layout();
                let y = CpuStorage::of(&storage)?.clone();
                let sum = if by_passes {
                    add_low_rank_by_passes(y, (m, n), Some(&bias), &terms)?
                } else {
                    y.add_low_rank((m, n), Some(&bias), &terms)?
                };
                f64::cpu_storage_data(sum.to_dtype(&Layout::contiguous((m, n)), DType::F64)?)
            };
            let apart =
                sum(true)?.iter().zip(&sum(false)?).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(apart < tolerance, "{apart} in {dtype:?}");
        }
        Ok(())
    }
}
