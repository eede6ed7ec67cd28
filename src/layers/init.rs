//! Initialisation: the factors of a new adapter, and torch's initial weights.

use super::binding::placeholder::dequantized;
use super::config::LoraConfig;
use super::init_lora_weights::InitLoraWeights;
use super::initial::{self, set, Initial};
use super::names::Part;
use super::placement::Placement;
use crate::ops::{self, checked_product, LowRank, Magnitude, Split};
use candle_core::{bail, DType, Result, Tensor};
use candle_nn::init::{Init, ZERO};
use candle_nn::VarBuilder;

/// How the factors are initialised. One of them is zero, so that ΔW = 0 at the start.
pub(super) enum FactorInit {
    /// A ~ U(±1/√columns), or N(0, 1/r²) if the configuration says so; B = 0
    RandomA,
    /// A = 0, B ~ N(0, 1): the columns of A of unseen tokens stay zero (microsoft/LoRA #14)
    NormalB,
}

/// U(±1/√fan_in), torch's initialisation of weights and biases.
pub(super) fn uniform(fan_in: usize) -> Init {
    let bound = 1. / (fan_in as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// `lora_A` (ranks, columns) and `lora_B` (rows, ranks) from `vb`, for all outputs at once, and with DoRA the
/// magnitude.
pub(super) fn low_rank(
    (ranks, columns): (usize, usize),
    rows: usize,
    init: FactorInit,
    cfg: &LoraConfig,
    (base, placement): (&Tensor, Placement),
    vb: &VarBuilder,
) -> Result<LowRank> {
    let split = Split { outputs: 0..rows, ranks: 0..ranks, b_rows: 0..rows };
    let shapes = ((ranks, columns), (rows, ranks));
    check_sizes([shapes.0, shapes.1])?;
    let initial = match (&init, placement) {
        (FactorInit::RandomA, Placement::AsIs | Placement::Transposed) => {
            Initial::new(cfg, base, placement, vb)?
        }
        _ => None,
    };
    let [mut a, mut b] = factors(shapes.0, shapes.1, init, cfg, base.dtype(), vb)?;
    if let Some(initial) = &initial {
        initial.start([&mut a, &mut b])?;
    }
    let update = LowRank::new(a, b, cfg.scaling(), cfg.lora_dropout, vec![split]);
    let update = match initial {
        Some(initial) => update.with_initial(initial.into_factors()),
        None => update,
    };
    with_dora(update, cfg, (base, placement), vb)
}

/// The update with its magnitude, if it has one.
fn with_dora(
    update: LowRank,
    cfg: &LoraConfig,
    (base, placement): (&Tensor, Placement),
    vb: &VarBuilder,
) -> Result<LowRank> {
    if !cfg.use_dora {
        return Ok(update);
    }
    let magnitude = magnitude(cfg, base, placement, vb)?;
    refuse_zero(&update, &magnitude, base, placement)?;
    Ok(update.with_magnitude(magnitude))
}

/// The update of a kernel (out, in, k..) by the kernels `lora_A` (ranks, in, k..) and `lora_B` (out, ranks, 1..), as
/// PEFT's.
pub(super) fn kernels(
    ranks: usize,
    cfg: &LoraConfig,
    base: &Tensor,
    vb: &VarBuilder,
) -> Result<LowRank> {
    initial::refuse(vb)?;
    let [a_dims, b_dims] = kernel_dims(ranks, base);
    checked_product(&[&a_dims[..], &[16]].concat())?;
    let fan_in = a_dims[1..].iter().product();
    let (a_init, b_init) = random_a(cfg, fan_in);
    let dtype = cfg.adapter_dtype(base.dtype());
    let a = vb.get_with_hints_dtype(a_dims, Part::A.name(), a_init, dtype)?;
    let b = vb.get_with_hints_dtype(b_dims, Part::B.name(), b_init, dtype)?;
    let update = LowRank::kernels(a, b, cfg.scaling(), cfg.lora_dropout)?;
    with_dora(update, cfg, (base, Placement::Reshaped), vb)
}

/// The dimensions of such kernels.
fn kernel_dims(ranks: usize, base: &Tensor) -> [Vec<usize>; 2] {
    let dims = base.dims();
    let ones = vec![1; dims.len() - 2];
    [[&[ranks], &dims[1..]].concat(), [&[dims[0], ranks], &ones[..]].concat()]
}

/// The initialisation of a random A, and of B.
fn random_a(cfg: &LoraConfig, fan_in: usize) -> (Init, Init) {
    let a = match cfg.init_lora_weights {
        InitLoraWeights::Gaussian => Init::Randn { mean: 0., stdev: 1. / cfg.r as f64 },
        _ => uniform(fan_in),
    };
    (a, Init::Const(0.))
}

/// An error if an output of W + ΔW is zero: it has no direction, and is 0/0.
fn refuse_zero(
    update: &LowRank,
    magnitude: &Magnitude,
    base: &Tensor,
    placement: Placement,
) -> Result<()> {
    let has_zero = |squares: &Tensor| squares.min_all()?.to_dtype(DType::F64)?.to_scalar::<f64>();
    let Some(squares) = &magnitude.base_squares else { return Ok(()) };
    if squares.elem_count() == 0 || has_zero(squares)? > 0. {
        return Ok(());
    }
    let base = dequantized(base.clone())?;
    let delta = update.joined()?.detached().delta(base.dtype())?;
    let delta = match placement {
        Placement::Transposed => delta.t()?,
        Placement::AsIs | Placement::Reshaped => delta,
    };
    let sum = (base.to_dtype(delta.dtype())? + delta.reshape(base.shape())?)?;
    norms(&ops::squares(&sum, placement.output_dim())?).map(drop)
}

/// `lora_magnitude_vector` (out) from `vb`, initialised with the norms of the base's outputs.
fn magnitude(
    cfg: &LoraConfig,
    base: &Tensor,
    placement: Placement,
    vb: &VarBuilder,
) -> Result<Magnitude> {
    let (is_new, dtype) =
        (!vb.contains_tensor(Part::Magnitude.name()), cfg.adapter_dtype(base.dtype()));
    let squares = ops::squares(&dequantized(base.clone())?, placement.output_dim())?;
    let initial = is_new.then(|| norms(&squares)?.to_dtype(dtype)).transpose()?;
    let mut m = vb.get_with_hints_dtype(squares.shape(), Part::Magnitude.name(), ZERO, dtype)?;
    if let Some(initial) = initial {
        set(&mut m, initial)?;
    }
    Ok(Magnitude { m, base_squares: (!base.track_op()).then_some(squares), norms: None })
}

/// DoRA's initial magnitude, the norms of the outputs of `w`, which are its dimension `dim`.
pub(crate) fn initial_magnitude(w: &Tensor, dim: usize) -> Result<Tensor> {
    norms(&ops::squares(w, dim)?)
}

/// An error if a norm is zero.
fn norms(squares: &Tensor) -> Result<Tensor> {
    let zero =
        squares.eq(0f64)?.flatten_all()?.to_vec1::<u8>()?.into_iter().position(|zero| zero == 1);
    match zero {
        None => squares.sqrt(),
        Some(output) => bail!(
            "output {output} of the weight is zero, and use_dora needs its direction: leave the layer out"
        ),
    }
}

/// Whether a layer has a bias of B: it is to get one, or `vb` has it.
pub(super) fn has_bias_of_b(cfg: &LoraConfig, vb: &VarBuilder) -> bool {
    cfg.r > 0 && (cfg.lora_bias || initial::has(vb, Part::BiasOfB.name()))
}

/// `lora_bias` (out) from `vb`, if the layer has it.
pub(super) fn bias_of_b(
    out: usize,
    cfg: &LoraConfig,
    base: DType,
    vb: &VarBuilder,
) -> Result<Option<Tensor>> {
    let get = || vb.get_with_hints_dtype(out, Part::BiasOfB.name(), ZERO, cfg.adapter_dtype(base));
    has_bias_of_b(cfg, vb).then(get).transpose()
}

/// `lora_A` and `lora_B` of the given shapes from `vb`, for several splits of the outputs.
pub(super) fn split_low_rank(
    a_shape: (usize, usize),
    b_shape: (usize, usize),
    splits: Vec<Split>,
    init: FactorInit,
    cfg: &LoraConfig,
    base: DType,
    vb: &VarBuilder,
) -> Result<LowRank> {
    initial::refuse(vb)?;
    let [a, b] = factors(a_shape, b_shape, init, cfg, base, vb)?;
    Ok(LowRank::new(a, b, cfg.scaling(), cfg.lora_dropout, splits))
}

/// An error if the bytes of a factor, with room for the largest dtype and a copy, exceed a `usize`.
fn check_sizes(shapes: [(usize, usize); 2]) -> Result<()> {
    shapes.iter().try_for_each(|(rows, columns)| checked_product(&[*rows, *columns, 16]).map(drop))
}

/// `lora_A` and `lora_B` of the given shapes from `vb`.
fn factors(
    a_shape: (usize, usize),
    b_shape: (usize, usize),
    init: FactorInit,
    cfg: &LoraConfig,
    base: DType,
    vb: &VarBuilder,
) -> Result<[Tensor; 2]> {
    check_sizes([a_shape, b_shape])?;
    let dtype = cfg.adapter_dtype(base);
    let (a_init, b_init) = match init {
        FactorInit::RandomA => random_a(cfg, a_shape.1),
        FactorInit::NormalB => (Init::Const(0.), Init::Randn { mean: 0., stdev: 1. }),
    };
    let a = vb.get_with_hints_dtype(a_shape, Part::A.name(), a_init, dtype)?;
    let b = vb.get_with_hints_dtype(b_shape, Part::B.name(), b_init, dtype)?;
    Ok([a, b])
}
