//! Shared by the tests: the device, pseudo-random values, and comparisons.
#![allow(dead_code)] // Each test uses only some of it.

mod random;

use candle_core::{DType, Device, Result, Shape, Tensor};
use loralib::LoraConfig;
use std::io::Write;
use std::sync::OnceLock;

/// An adapter's options, with alpha ≠ r.
pub const CFG: LoraConfig = LoraConfig { r: 2, lora_alpha: 3., ..LoraConfig::DEFAULT };

/// The device under test: the first GPU of a build with `cuda`, or the CPU if there is none. With
/// `LORALIB_DEVICE=cuda` a missing GPU is an error.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE
        .get_or_init(|| {
            let wanted = std::env::var("LORALIB_DEVICE").is_ok_and(|name| name == "cuda");
            Device::new_cuda(0).unwrap_or_else(|e| {
                assert!(!wanted, "no GPU to test on: {e}");
                // Not println!, whose output a passing test does not show.
                let _ = writeln!(std::io::stderr(), "run on the CPU, skipped on a GPU: {e}");
                Device::Cpu
            })
        })
        .clone()
}

/// Whether the crate's own kernels compute, and not candle's as on a device.
pub fn fused() -> bool {
    device().is_cpu() && std::env::var_os("LORALIB_COMPOSED").is_none()
}

/// Whether matrix products are the crate's own too.
pub fn faer() -> bool {
    let built = cfg!(all(
        feature = "faer",
        target_arch = "x86_64",
        not(any(feature = "mkl", feature = "accelerate"))
    ));
    built && fused()
}

/// Pseudo-random values in [-1, 1).
pub fn rnd(seed: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    random::uniform(seed, &shape.into())?.to_dtype(dtype)?.to_device(&device())
}

/// Pseudo-random values of mean 0 and variance 1, others in each call.
pub fn randn(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    random::normal(shape)?.to_dtype(dtype)?.to_device(device)
}

/// The result is an error whose text has all these parts.
pub fn says<T, E: ToString>(result: std::result::Result<T, E>, parts: &[&str]) {
    let Err(error) = result else { panic!("no error, expected {parts:?}") };
    let error = error.to_string();
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
}

/// Every value as f64.
pub fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// The bits of every value as f64, which represents all four float dtypes exactly.
pub fn bits(t: &Tensor) -> Result<Vec<u64>> {
    Ok(values(t)?.into_iter().map(f64::to_bits).collect())
}

/// The largest difference, relative to the largest value of `b`.
pub fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (values(a)?, values(b)?);
    let largest = b.iter().fold(1e-12, |m: f64, v| m.max(v.abs()));
    let apart = a.iter().zip(&b).fold(0f64, |m, (a, b)| match (a - b).abs() {
        d if d.is_nan() => f64::INFINITY,
        d => m.max(d),
    });
    Ok(apart / largest)
}
