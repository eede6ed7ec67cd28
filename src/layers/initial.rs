//! Initial factors that are a part of the base weight, which is subtracted again.

use super::binding::placeholder::dequantized;
use super::config::LoraConfig;
use super::init_lora_weights::InitLoraWeights;
use super::names::Part;
use super::placement::Placement;
use crate::ops::{self, is_finite, Svd};
use candle_core::{bail, Result, Tensor, Var};
use candle_nn::init::ZERO;
use candle_nn::VarBuilder;

/// A₀ (r, in) and B₀ (out, r).
pub(super) struct Initial {
    factors: [Tensor; 2],
    is_new: bool,
}

impl Initial {
    /// The initial factors of the layer of `vb`: those that it has, or new ones for new factors, before these are
    /// made.
    pub fn new(
        cfg: &LoraConfig,
        base: &Tensor,
        placement: Placement,
        vb: &VarBuilder,
    ) -> Result<Option<Self>> {
        let is_new = !vb.contains_tensor(Part::A.name());
        let known = match (has(vb, Part::InitialA.name()), has(vb, Part::InitialB.name())) {
            (a, b) if a != b => bail!(
                "{:?} is missing, and its other initial factor is there",
                path(vb, if a { Part::InitialB } else { Part::InitialA }.name())
            ),
            (known, _) => known,
        };
        if !(known || (is_new && cfg.init_lora_weights.of_base())) {
            return Ok(None);
        }
        let (mut out_dim, mut in_dim) = base.dims2()?;
        if placement == Placement::Transposed {
            (out_dim, in_dim) = (in_dim, out_dim);
        }
        // Before the variables are made, so that an error leaves none.
        let values = match known {
            true => None,
            false => {
                let part = part_of(base, placement, cfg);
                Some(part.map_err(|e| e.context(path(vb, "weight")))?)
            }
        };
        let dtype = cfg.adapter_dtype(base.dtype());
        let mut a = vb.get_with_hints_dtype((cfg.r, in_dim), Part::InitialA.name(), ZERO, dtype)?;
        let mut b =
            vb.get_with_hints_dtype((out_dim, cfg.r), Part::InitialB.name(), ZERO, dtype)?;
        if let Some([a0, b0]) = values {
            set(&mut a, a0.to_dtype(dtype)?.to_device(vb.device())?)?;
            set(&mut b, b0.to_dtype(dtype)?.to_device(vb.device())?)?;
        }
        Ok(Some(Self { factors: [a, b], is_new }))
    }

    /// Gives new factors the initial values.
    pub fn start(&self, [a, b]: [&mut Tensor; 2]) -> Result<()> {
        if self.is_new {
            set(a, self.factors[0].copy()?.detach())?;
            set(b, self.factors[1].copy()?.detach())?;
        }
        Ok(())
    }

    pub fn into_factors(self) -> [Tensor; 2] {
        self.factors
    }
}

/// Whether `vb` has this tensor, and not every one, as `VarBuilder::zeros` has.
pub(super) fn has(vb: &VarBuilder, name: &str) -> bool {
    vb.contains_tensor(name) && !vb.contains_tensor("")
}

fn path(vb: &VarBuilder, name: &str) -> String {
    match vb.prefix() {
        prefix if prefix.is_empty() => name.to_owned(),
        prefix => format!("{prefix}.{name}"),
    }
}

/// An error if a layer that is not a [`Linear`](crate::Linear) has initial factors.
pub(super) fn refuse(vb: &VarBuilder) -> Result<()> {
    match has(vb, Part::InitialA.name()) {
        false => Ok(()),
        true => {
            bail!("{:?}: only a linear layer has initial factors", path(vb, Part::InitialA.name()))
        }
    }
}

/// Sets a variable that `VarBuilder` has made, or replaces its tensor.
pub(super) fn set(tensor: &mut Tensor, value: Tensor) -> Result<()> {
    match tensor.is_variable() {
        true => Var::from_tensor(tensor)?.set(&value)?,
        false => *tensor = value,
    }
    Ok(())
}

/// A₀ and B₀ in F64, on the CPU.
fn part_of(base: &Tensor, placement: Placement, cfg: &LoraConfig) -> Result<[Tensor; 2]> {
    let (how, r, scaling) = (cfg.init_lora_weights, cfg.r, cfg.scaling());
    if base.track_op() {
        bail!(
            "init_lora_weights = {how:?}: the base weight is a variable, whose values may change: give the layer a \
             frozen base, as by `var_builder` or `Adapter::var_builder`"
        )
    }
    let w = dequantized(base.clone())?;
    let w = if placement == Placement::Transposed { w.t()? } else { w };
    let most = w.dims2()?.0.min(w.dims2()?.1);
    if r > most {
        bail!(
            "init_lora_weights = {how:?}: r is {r}, expected at most {most} for a weight {:?}",
            w.dims()
        )
    }
    if scaling <= 0. {
        bail!("init_lora_weights = {how:?}: the scaling is {scaling}, expected a positive one")
    }
    if !is_finite(&w)? {
        bail!("init_lora_weights = {how:?}: the base weight has values that are not finite")
    }
    let by_svd = |iterations| {
        let Svd { u, s, v } = ops::svd(&w, r, iterations)?;
        let root = (s / scaling)?.sqrt()?;
        Ok([v.broadcast_mul(&root)?.t()?.contiguous()?, u.broadcast_mul(&root)?])
    };
    match how {
        InitLoraWeights::Pissa => by_svd(None),
        InitLoraWeights::PissaNiter(iterations) => by_svd(Some(iterations)),
        InitLoraWeights::Olora => {
            let (q, upper) = ops::qr(&w)?;
            Ok([upper.narrow(0, 0, r)?.contiguous()?, q.narrow(1, 0, r)?.contiguous()?])
        }
        InitLoraWeights::Uniform | InitLoraWeights::Gaussian => {
            bail!("init_lora_weights = {how:?} is not a part of the base weight")
        }
    }
}
