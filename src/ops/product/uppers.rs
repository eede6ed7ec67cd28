//! The upper halves of the vector registers, which faer's kernels leave in use.

use pulp::core_arch::x86::Avx;

/// Zeroes them in this thread (`vzeroupper`), which faer's kernels return without. Until then each
/// instruction of plain SSE, of which most compiled code consists, merges into the old upper half of its
/// destination, and so waits for whatever last wrote that register.
pub(super) fn zero_uppers() {
    if let Some(avx) = Avx::try_new() {
        avx._mm256_zeroupper();
    }
}
