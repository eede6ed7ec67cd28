//! The embedding.

use super::adapted::Adapted;
use super::low_rank::Start;
use super::weight::{Placement, Running, Weight};
use super::{LoraConfig, LowRank};
use crate::ops;
use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// The kind of [`Embedding`].
#[derive(Debug, Clone, Copy)]
pub struct Lookup;

/// [`candle_nn::Embedding`] with a low-rank update of its table:
/// `y = W[ids] + (alpha/r)·(Aᵀ)[ids]·Bᵀ`.
///
/// `ids` is (..) of u8, u32, i32 or i64, `y` (.., dim), `W` (num, dim), `A` (r, num) and `B`
/// (dim, r). A starts at zero and B at N(0, 1), as in loralib: so only the columns of tokens that
/// were seen ever differ from zero.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use loralib as lora;
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let cfg = lora::LoraConfig { r: 4, lora_alpha: 8., ..Default::default() };
/// let table = lora::embedding(100, 16, cfg, vb)?;
/// let y = table.forward(&Tensor::new(&[[3u32, 99], [0, 3]], &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [2, 2, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type Embedding = Adapted<Lookup>;

impl Embedding {
    /// Wraps a layer. Only `lora_A` (r, num) and `lora_B` (dim, r) come from `vb`.
    ///
    /// # Errors
    /// When an option is out of its range or has no meaning here (`lora_dropout`,
    /// `fan_in_fan_out`), or `vb` has tensors of other shapes.
    pub fn new(base: candle_nn::Embedding, cfg: LoraConfig, vb: VarBuilder) -> Result<Self> {
        let weight = base.embeddings();
        cfg.validate(weight.dtype())?;
        LoraConfig::refuse(
            "an embedding",
            &[("lora_dropout", cfg.lora_dropout > 0.), ("fan_in_fan_out", cfg.fan_in_fan_out)],
        )?;
        let (num, dim) = weight.dims2()?;
        let low_rank =
            || LowRank::new((cfg.r, num), dim, Start::NormalB, &cfg, weight.dtype(), &vb);
        let update = (cfg.r > 0).then(low_rank).transpose()?;
        let weight = Weight::new(weight.clone(), update, Placement::Transposed, &cfg)?;
        Ok(Self { kind: Lookup, weight })
    }

    /// The plain layer with the update merged into its table.
    ///
    /// # Errors
    /// When a merged value is not finite.
    pub fn into_merged(self) -> Result<candle_nn::Embedding> {
        let weight = self.weight.merged()?;
        let dim = weight.dim(1)?;
        Ok(candle_nn::Embedding::new(weight, dim))
    }
}

impl Module for Embedding {
    /// Ids (..) to rows (.., dim).
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let Running { weight, update, .. } = self.weight.running();
        ops::embedding(ids, &weight, update.as_ref())
    }
}

/// An embedding of `num` rows of `dim` values, its base and adapter from `vb`: `weight`, `lora_A`,
/// `lora_B`.
///
/// # Errors
/// When an option is out of its range or has no meaning here (`lora_dropout`, `fan_in_fan_out`), or
/// `vb` lacks a tensor or has it in another shape.
pub fn embedding(num: usize, dim: usize, cfg: LoraConfig, vb: VarBuilder) -> Result<Embedding> {
    let init = Init::Randn { mean: 0., stdev: 1. };
    let weight = vb.get_with_hints((num, dim), "weight", init)?;
    Embedding::new(candle_nn::Embedding::new(weight, dim), cfg, vb)
}
