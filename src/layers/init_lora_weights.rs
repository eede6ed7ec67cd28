//! How new factors are initialised, by PEFT's names.

use crate::Error;
use std::str::FromStr;

/// The initialisation of new factors, PEFT's `init_lora_weights`. A new layer equals its base with each of them, but
/// for the dropout of its update's input.
///
/// [`Pissa`](Self::Pissa) and [`Olora`](Self::Olora) initialise `lora_A` and `lora_B` with a part of the base weight,
/// which is subtracted again: ΔW = scaling · (B·A − B₀·A₀), with the initial factors B₀ and A₀ as frozen tensors
/// `lora_A_initial` and `lora_B_initial` beside the trained ones. The base weight itself stays as it is, where PEFT
/// changes it, and may be quantised. This crate's files contain the initial factors; an optimizer's state does
/// [with](crate::train::AdamW::with_frozen) [`Adapter::frozen_vars`](crate::Adapter::frozen_vars). Where an adapter is
/// [loaded](crate::Adapter::load), merged, or written in another format, it is a plain adapter of rank 2r with the same
/// scaling, as after PEFT's own conversion. A forward takes the products of rank 2r.
///
/// They are for [`Linear`](crate::Linear) alone and need the feature `faer`. An error for
/// [`MergedLinear`](crate::MergedLinear) and convolutions; for a base weight that is a variable, whose values may
/// change, or has values that are not finite; if the scaling is not positive; and if r exceeds a dimension of the
/// weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum InitLoraWeights {
    /// `lora_A` from U(±1/√columns) and `lora_B` zero, as loralib; PEFT's `true`.
    #[default]
    Uniform,
    /// `lora_A` from N(0, 1/r²) and `lora_B` zero; PEFT's `"gaussian"`.
    Gaussian,
    /// The r largest singular values of the weight with their vectors ([Meng et al.
    /// 2024](https://arxiv.org/abs/2404.02948)); PEFT's `"pissa"`. The decomposition of a large weight takes long: for
    /// one of (2048, 2048) and r = 16 6 s, and 0.1 s by `PissaNiter(4)` (two cores of an AMD EPYC,
    /// `cargo test --release --lib decompose -- --ignored --nocapture`).
    Pissa,
    /// [`Pissa`](Self::Pissa) by this number of subspace iterations; PEFT's `"pissa_niter_[number]"`. Each initial
    /// factor is approximate, the layer nonetheless equals its base.
    PissaNiter(usize),
    /// The first r columns and rows of the weight's QR decomposition ([Büyükakyüz
    /// 2024](https://arxiv.org/abs/2406.01775)); PEFT's `"olora"`.
    Olora,
}

impl InitLoraWeights {
    /// Whether the initial factors are a part of the base weight.
    pub(super) fn of_base(self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_) | Self::Olora)
    }
}

impl FromStr for InitLoraWeights {
    type Err = Error;

    /// PEFT's names, and `"true"`.
    fn from_str(name: &str) -> Result<Self, Error> {
        let niter = || name.strip_prefix("pissa_niter_")?.parse().ok();
        match name {
            "true" => Ok(Self::Uniform),
            "gaussian" => Ok(Self::Gaussian),
            "pissa" => Ok(Self::Pissa),
            "olora" => Ok(Self::Olora),
            _ => niter().map(Self::PissaNiter).ok_or_else(|| {
                let reason = "a new adapter is initialised by true, \"gaussian\", \"pissa\", \
                              \"pissa_niter_[number]\" or \"olora\"";
                Error::unsupported(format!("init_lora_weights = {name:?}"), reason)
            }),
        }
    }
}
