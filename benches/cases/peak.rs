//! Memory in MiB: of this process or, on a GPU, of the device.

use super::device::device;
use candle_core::Result;

/// The peak of this process's resident memory (Linux), or what is in use on the GPU: as long as a
/// device is not waited for, CUDA's allocator gives nothing back.
pub fn peak() -> Result<f64> {
    if !device().is_cpu() {
        return in_use();
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok());
    Ok(kib.map_or(f64::NAN, |kib: f64| kib / 1024.))
}

#[cfg(feature = "cuda")]
fn in_use() -> Result<f64> {
    let stream = device().as_cuda_device()?.cuda_stream();
    let (free, total) = stream.context().mem_get_info().map_err(candle_core::Error::wrap)?;
    Ok((total - free) as f64 / f64::from(1 << 20))
}

#[cfg(not(feature = "cuda"))]
fn in_use() -> Result<f64> {
    Ok(f64::NAN)
}
