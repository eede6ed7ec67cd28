//! What an adapter has of one layer.

use super::config::LayerConfig;
use crate::layers::{same_scaling, LayerKind, LoraConfig, Part};
use crate::ops::joined;
use crate::{Error, Result};
use candle_core::Tensor;

/// The update of one layer: its factors and options, in loralib's shapes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LayerWeights {
    /// The kind of the layer, if it is known.
    pub kind: Option<LayerKind>,
    /// The rank.
    pub r: usize,
    /// `lora_alpha`.
    pub lora_alpha: f64,
    /// Whether the base stores the weight as (in, out); `None` where the adapter's option counts.
    pub fan_in_fan_out: Option<bool>,
    /// The rank of a convolution in PEFT's shapes; see [`LayerConfig::conv_rank`].
    pub conv_rank: Option<usize>,
    /// `lora_A`, such as (r, in).
    pub a: Tensor,
    /// `lora_B`, such as (out, r).
    pub b: Tensor,
    /// DoRA's magnitude (out).
    pub magnitude: Option<Tensor>,
    /// A₀ and B₀, whose product is subtracted; see [`InitLoraWeights`](crate::layers::InitLoraWeights).
    pub initial: Option<[Tensor; 2]>,
    /// The bias of B (out), PEFT's `lora_bias`.
    pub bias: Option<Tensor>,
}

impl LayerWeights {
    /// A layer with two factors.
    pub(crate) fn new(kind: Option<LayerKind>, factors: Factors) -> Self {
        let Factors { a, b, r, lora_alpha } = factors;
        let (conv_rank, magnitude, initial, bias) = (None, None, None, None);
        let fan_in_fan_out = None;
        Self { kind, r, lora_alpha, fan_in_fan_out, conv_rank, a, b, magnitude, initial, bias }
    }

    /// The layer's own options; `common` are the adapter's.
    pub(crate) fn options(&self, common: &LoraConfig) -> LoraConfig {
        self.config().over(*common)
    }

    /// The entry of an [`AdapterConfig`](super::AdapterConfig) for this layer alone.
    pub(super) fn config(&self) -> LayerConfig {
        LayerConfig {
            kind: self.kind.clone(),
            r: Some(self.r),
            lora_alpha: Some(self.lora_alpha),
            fan_in_fan_out: self.fan_in_fan_out,
            conv_rank: self.conv_rank,
        }
    }

    /// The update of the transposed weight, of a layer of another kind.
    pub(crate) fn transposed(&self, kind: LayerKind) -> Result<Self> {
        let (a, b) = (self.b.t()?.contiguous()?, self.a.t()?.contiguous()?);
        Ok(Self { kind: Some(kind), a, b, ..self.clone() })
    }

    /// Whether this is a parameter that is no layer's weight.
    pub(crate) fn is_parameter(&self) -> bool {
        matches!(self.kind, Some(LayerKind::Parameter { .. }))
    }

    pub(crate) fn factors(&self) -> Factors {
        Factors { a: self.a.clone(), b: self.b.clone(), r: self.r, lora_alpha: self.lora_alpha }
    }

    /// The tensors by their names in the layer.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (Part<'static>, &Tensor)> {
        let [a0, b0] = match &self.initial {
            Some([a0, b0]) => [Some(a0), Some(b0)],
            None => [None, None],
        };
        let all = [
            (Part::A, Some(&self.a)),
            (Part::B, Some(&self.b)),
            (Part::InitialA, a0),
            (Part::InitialB, b0),
            (Part::Magnitude, self.magnitude.as_ref()),
            (Part::BiasOfB, self.bias.as_ref()),
        ];
        all.into_iter().filter_map(|(part, tensor)| Some((part, tensor?)))
    }

    /// What the layer has beside its factors.
    pub(crate) fn other_part(&self) -> Option<Part<'static>> {
        self.tensors().map(|(part, _)| part).find(|part| !part.is_factor())
    }

    /// An error if the options or the shapes cannot be those of the layer at `path`. The rank of a factor may be a
    /// multiple of r in a `MergedLinear`, a convolution or an undeclared layer.
    pub(super) fn check(&self, path: &str, common: &LoraConfig) -> Result<()> {
        let cfg = self.options(common);
        let wrong = |part: Part, reason: String| Err(Error::tensor(part.at(path), reason));
        if !cfg.lora_alpha.is_finite() {
            let reason = format!("lora_alpha is {}, expected a finite number", cfg.lora_alpha);
            return wrong(Part::A, reason);
        }
        for (part, tensor) in self.tensors().filter(|(part, _)| part.is_factor()) {
            let rank = match (part, tensor.dims()) {
                (Part::A, &[rank, _]) | (Part::B, &[_, rank]) => rank,
                _ => continue,
            };
            let exact = matches!(self.kind, Some(LayerKind::Linear | LayerKind::Embedding));
            if rank.checked_rem(self.r) != Some(0) || (exact && rank != self.r) {
                let reason = format!("its rank is {rank}, the configuration has r = {}", self.r);
                return wrong(part, reason);
            }
        }
        match (&self.kind, &self.initial) {
            (None | Some(LayerKind::Linear), _) | (_, None) => {}
            (Some(kind), _) => {
                let reason = format!("only a linear layer has initial factors, not a {kind:?}");
                return wrong(Part::InitialA, reason);
            }
        }
        match (&self.magnitude, cfg.use_dora) {
            (Some(_), false) => {
                wrong(Part::Magnitude, "the configuration's use_dora is not set".to_owned())
            }
            (None, true) => {
                let reason = "it is missing, the configuration has use_dora".to_owned();
                wrong(Part::Magnitude, reason)
            }
            _ => Ok(()),
        }
    }

    /// The layer with `B·A − B₀·A₀` as one pair of factors, of twice the rank and the same scaling.
    pub(super) fn joined(&self, path: &str, rslora: bool) -> Result<Self> {
        let Some([a0, b0]) = &self.initial else { return Ok(self.clone()) };
        let [a, b] = joined([&self.a, &self.b], [a0, b0])
            .map_err(|e| Error::tensor(Part::InitialA.at(path), e))?;
        let factors = Factors { a, b, r: self.r, lora_alpha: self.lora_alpha };
        let Factors { a, b, r, lora_alpha } = factors.with_rank(2 * self.r, rslora);
        Ok(Self { a, b, r, lora_alpha, initial: None, ..self.clone() })
    }
}

/// The factors of a layer with the two options that scale them, on their way between this crate's shapes and those of
/// other formats.
#[derive(Debug, Clone)]
pub(crate) struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    pub r: usize,
    pub lora_alpha: f64,
}

impl Factors {
    /// Tensors A and B with the `lora_alpha` of a scaling.
    pub fn scaled([a, b]: [Tensor; 2], r: usize, scaling: f64, rslora: bool) -> Self {
        let lora_alpha = scaling * if rslora { (r as f64).sqrt() } else { r as f64 };
        Self { a, b, r, lora_alpha }
    }

    /// The same tensors with the rank `r` and the `lora_alpha` that keeps the scaling.
    pub fn with_rank(self, r: usize, rslora: bool) -> Self {
        let lora_alpha = same_scaling(self.lora_alpha, self.r, r, rslora);
        Self { r, lora_alpha, ..self }
    }

    /// The same update at a larger rank, by zeros.
    pub fn padded(self, rank: usize, rslora: bool) -> candle_core::Result<Self> {
        let own = self.r;
        let Self { a, b, r, lora_alpha } = self.with_rank(rank, rslora);
        let (a, b) = (a.pad_with_zeros(0, 0, rank - own)?, b.pad_with_zeros(1, 0, rank - own)?);
        Ok(Self { a, b, r, lora_alpha })
    }

    /// The same update without `rslora`.
    pub fn without_rslora(self, rslora: bool) -> Self {
        let lora_alpha = match rslora {
            true => self.lora_alpha / (self.r as f64).sqrt() * self.r as f64,
            false => self.lora_alpha,
        };
        Self { lora_alpha, ..self }
    }
}
