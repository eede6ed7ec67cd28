//! Pseudo-random values, the same in every run and on every device: candle's cannot be seeded on the CPU.

use candle_core::{Device, Result, Shape, Tensor};
use std::cell::Cell;

/// Values in [-1, 1), in F64 on the CPU.
pub fn uniform(seed: u64, shape: &Shape) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values = (0..shape.elem_count()).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.
    });
    Tensor::from_vec(values.collect::<Vec<f64>>(), shape, &Device::Cpu)
}

/// Values of mean 0 and variance 1, near a normal distribution's, in F64 on the CPU. Each call in a test has others.
pub fn normal(shape: impl Into<Shape>) -> Result<Tensor> {
    thread_local!(static CALLS: Cell<u64> = const { Cell::new(0) });
    let (shape, first) = (shape.into(), 1000 + 4 * CALLS.get());
    CALLS.set(CALLS.get() + 1);
    let sum =
        (1..4).try_fold(uniform(first, &shape)?, |sum, i| sum + uniform(first + i, &shape)?)?;
    sum * (3f64.sqrt() / 2.)
}
