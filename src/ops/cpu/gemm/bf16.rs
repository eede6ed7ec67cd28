//! Products of BF16 operands by AVX512-BF16, which sums in F32. faer has no such kernels.

use super::lines::Lines;
use crate::ops::cpu::buffer::filled;
use gemmkit::{gemm, MatMut, Parallelism};
use half::bf16;

/// Whether the processor has the instructions. Without them faer's product of upcast operands is faster.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// `a·b`, rounded to BF16.
pub(super) fn product(a: Lines<bf16>, b: Lines<bf16>) -> Vec<bf16> {
    let (a, b) = (a.view(), b.view());
    let (m, n) = (a.rows(), b.cols());
    let mut y = filled(bf16::ZERO, m * n);
    let out = MatMut::from_row_major(&mut y, m, n);
    gemm(bf16::ONE, a, b, bf16::ZERO, out, Parallelism::default());
    y
}
