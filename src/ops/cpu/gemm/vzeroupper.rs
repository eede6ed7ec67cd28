//! `vzeroupper`, which faer's kernels return without.

use pulp::core_arch::x86::Avx;

/// Zeroes the upper halves of this thread's vector registers. While they are in use, each SSE
/// instruction (of which most compiled code consists) merges into its destination's upper half, and so
/// depends on the last instruction that wrote that register.
pub(super) fn vzeroupper() {
    if let Some(avx) = Avx::try_new() {
        avx._mm256_zeroupper();
    }
}
