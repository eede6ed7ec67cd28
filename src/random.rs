//! Random tensors for the tests of private functions, the same in every run: candle's cannot be seeded on the CPU.

use candle_core::{Device, Result, Shape, Tensor};
use rand_chacha::rand_core::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use std::cell::RefCell;

/// Normal values in F64 on the CPU. Each call in a test has others.
pub fn normal(shape: impl Into<Shape>) -> Result<Tensor> {
    thread_local!(static RNG: RefCell<ChaCha8Rng> = RefCell::new(ChaCha8Rng::seed_from_u64(0)));
    let shape = shape.into();
    let values: Vec<f64> = RNG
        .with_borrow_mut(|rng| StandardNormal.sample_iter(rng).take(shape.elem_count()).collect());
    Tensor::from_vec(values, shape, &Device::Cpu)
}
