//! Seeded initialisation, because candle's random numbers on the CPU take no seed.

use super::source::{from_source, Source, Wanted};
use crate::Result;
use candle_core::{Device, Shape, Tensor, Var};
use candle_nn::init::{Init, NormalOrUniform, ZERO};
use candle_nn::VarBuilder;
use fnv::FnvHasher;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use std::hash::Hasher;

/// `vb` with a seeded initialisation of new variables. It depends on `seed` and on the variable's name,
/// shape and distribution alone: adding a layer changes no other. Tensors that `vb` already has are
/// unchanged.
///
/// Wrap [`var_builder`](crate::var_builder)'s result; as its base, `seeded` has no effect on the adapter.
/// The numbers are not torch's for the same seed. Dropout on the CPU stays unseeded, because candle draws
/// it; [`Adapter::seed`](crate::Adapter::seed) seeds it too.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
/// # fn main() -> loralib::Result<()> {
/// let cfg = loralib::LoraConfig { r: 2, ..Default::default() };
/// let new = || {
///     let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
///     loralib::linear(4, 3, cfg, loralib::base::seeded(vb, 42))
/// };
/// let (one, other) = (new()?, new()?);
/// let values = |layer: &loralib::Linear| layer.lora_a().map(|a| a.to_vec2::<f32>()).transpose();
/// assert_eq!(values(&one)?, values(&other)?);
/// # Ok(())
/// # }
/// ```
pub fn seeded(vb: VarBuilder<'_>, seed: u64) -> VarBuilder<'_> {
    let (dtype, device, prefix) = (vb.dtype(), vb.device().clone(), vb.prefix());
    let vb = from_source(Seeded { vb: vb.root(), seed }, dtype, &device);
    if prefix.is_empty() {
        vb
    } else {
        vb.pp(prefix)
    }
}

/// The number of a variable's random stream: the hash must never change, as std's does.
fn stream(name: &str) -> u64 {
    let mut hash = FnvHasher::default();
    hash.write(name.as_bytes());
    hash.finish()
}

struct Seeded<'a> {
    /// At the root, so that names are complete.
    vb: VarBuilder<'a>,
    seed: u64,
}

impl Source for Seeded<'_> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let Wanted { init, dtype, device, .. } = *wanted;
        let is_new = dtype.is_float() && !self.vb.has(name);
        let shape = wanted.shape.filter(|_| is_new);
        let Some((shape, distribution)) =
            shape.and_then(|shape| Some((shape, Distribution::new(init, shape)?)))
        else {
            return self.vb.tensor(name, wanted);
        };
        // ZERO instead of `init`, which candle would draw in vain.
        let tensor = self.vb.tensor(name, &Wanted { init: ZERO, ..*wanted })?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(stream(name));
        let values: Vec<f64> =
            (0..shape.elem_count()).map(|_| distribution.draw(&mut rng)).collect();
        let initial = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?;
        let initial = initial.to_device(device)?;
        if !tensor.is_variable() {
            return Ok(initial);
        }
        Var::from_tensor(&tensor)?.set(&initial)?;
        Ok(tensor)
    }

    fn has(&self, name: &str) -> bool {
        self.vb.has(name)
    }
}

/// A distribution: `mean + spread·z`, with z normal or uniform in [-1, 1).
struct Distribution {
    mean: f64,
    spread: f64,
    dist: NormalOrUniform,
}

impl Distribution {
    /// `None` for a constant.
    fn new(init: Init, shape: &Shape) -> Option<Self> {
        let (mean, spread, dist) = match init {
            Init::Const(_) => return None,
            Init::Uniform { lo, up } => ((lo + up) / 2., (up - lo) / 2., NormalOrUniform::Uniform),
            Init::Randn { mean, stdev } => (mean, stdev, NormalOrUniform::Normal),
            Init::Kaiming { dist, fan, non_linearity } => {
                let stdev = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
                // A uniform distribution over ±b has the standard deviation b/√3.
                let width = if matches!(dist, NormalOrUniform::Uniform) { 3f64.sqrt() } else { 1. };
                (0., width * stdev, dist)
            }
        };
        Some(Self { mean, spread, dist })
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> f64 {
        let z = match self.dist {
            NormalOrUniform::Normal => rng.sample(StandardNormal),
            NormalOrUniform::Uniform => 2. * rng.random::<f64>() - 1.,
        };
        self.mean + self.spread * z
    }
}
