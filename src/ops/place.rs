//! Where operations run.

use candle_core::Device;
use std::env;
use std::sync::OnceLock;

/// Whether operations on `device` are the CPU's own, in one pass each. With the environment variable `LORALIB_COMPOSED`,
/// for tests, the CPU computes as a device does: by the same code, on candle's kernels.
pub(super) fn is_fused(device: &Device) -> bool {
    device.is_cpu() && !is_composed()
}

pub(super) fn is_composed() -> bool {
    static COMPOSED: OnceLock<bool> = OnceLock::new();
    *COMPOSED.get_or_init(|| env::var_os("LORALIB_COMPOSED").is_some())
}
