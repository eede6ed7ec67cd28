//! Where the benches run: on the first GPU in a build with `cuda`, else on the CPU.

use candle_core::Device;
use std::sync::OnceLock;

/// One device for all: tensors of two `Device::new_cuda(0)` do not mix.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| Device::cuda_if_available(0).expect("the first CUDA device"))
}
