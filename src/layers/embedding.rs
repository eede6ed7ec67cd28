//! The embedding.

use super::adapted::{sealed::Sealed, Adapted, Kind};
use super::batch_update::BatchUpdate;
use super::binding::placeholder::placeholder;
use super::config::{refuse_options, LoraConfig};
use super::init::{has_bias_of_b, low_rank, FactorInit};
use super::kind::LayerKind;
use super::placement::Placement;
use super::weight::{Effective, WeightTensors};
use crate::ops;
use candle_core::quantized::QTensor;
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// The kind of [`Embedding`].
#[derive(Debug, Clone, Copy, Default)]
pub struct EmbeddingKind {
    /// The id whose row is not trained.
    padding_idx: Option<usize>,
}

impl Sealed for EmbeddingKind {}

impl Kind for EmbeddingKind {
    fn layer_kind(&self) -> LayerKind {
        LayerKind::Embedding
    }
}

/// [`candle_nn::Embedding`] with a low-rank update of its table:
/// `y = W[ids] + (alpha/r)·(Aᵀ)[ids]·Bᵀ`.
///
/// `ids` is (..) of u8, u32, i32 or i64, `y` (.., dim), `W` (num, dim), `A` (r, num) and `B`
/// (dim, r). A is initialised with zeros and B with N(0, 1), as in loralib: the columns of A of unseen
/// tokens stay zero.
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
pub type Embedding = Adapted<EmbeddingKind>;

impl Embedding {
    /// Wraps a layer. `vb`, at the layer's path, gives `lora_A` (r, num) and `lora_B` (dim, r).
    ///
    /// # Errors
    /// If an option is out of range or not supported (`lora_dropout`, `fan_in_fan_out`, `lora_bias`), or `vb` has
    /// tensors of other shapes.
    pub fn new(base: candle_nn::Embedding, cfg: LoraConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            kind: EmbeddingKind::default(),
            weight: adapt(base.embeddings(), &cfg, &vb)?.into(),
        })
    }

    /// Wraps a quantised table (num, dim), which stays quantised: only the rows of the ids are decoded, to
    /// `vb`'s dtype. `vb` gives what it gives to [`Embedding::new`].
    ///
    /// # Errors
    /// If the table is not a matrix, or as [`Embedding::new`].
    pub fn quantized(table: Arc<QTensor>, cfg: LoraConfig, vb: VarBuilder) -> Result<Self> {
        let (_, dim) = table.shape().dims2()?;
        let base = placeholder(table, vb.dtype())?;
        Self::new(candle_nn::Embedding::new(base.tensor.clone(), dim), cfg, vb)
    }

    /// The same layer with torch's `padding_idx`: an id whose row of the table and whose column of `lora_A` get no
    /// gradient.
    ///
    /// # Errors
    /// If the table has no such row.
    pub fn with_padding_idx(mut self, padding_idx: usize) -> Result<Self> {
        let num = self.weight().dim(0)?;
        if padding_idx >= num {
            bail!("embedding: padding_idx {padding_idx} of a table of {num} rows")
        }
        self.kind = EmbeddingKind { padding_idx: Some(padding_idx) };
        Ok(self)
    }

    /// The candle_nn layer with the merged table.
    ///
    /// # Errors
    /// If a merged value is not finite.
    pub fn into_merged(self) -> Result<candle_nn::Embedding> {
        let weight = self.weight.merged()?;
        let dim = weight.dim(1)?;
        Ok(candle_nn::Embedding::new(weight, dim))
    }
}

/// The table with its update from `vb`.
pub(super) fn adapt(base: &Tensor, cfg: &LoraConfig, vb: &VarBuilder) -> Result<WeightTensors> {
    cfg.validate(base.dtype())?;
    refuse_options(
        "an embedding",
        &[
            ("lora_dropout", cfg.lora_dropout > 0.),
            ("fan_in_fan_out", cfg.fan_in_fan_out),
            ("lora_bias", has_bias_of_b(cfg, vb)),
        ],
    )?;
    let (num, dim) = base.dims2()?;
    let placed = (base, Placement::Transposed);
    let update = || low_rank((cfg.r, num), dim, FactorInit::NormalB, cfg, placed, vb);
    let update = (cfg.r > 0).then(update).transpose()?;
    WeightTensors::new(base.clone(), update, Placement::Transposed, cfg)
}

impl Module for Embedding {
    /// Ids (..) to rows (.., dim).
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let Effective { weight, update, .. } = self.weight.effective()?;
        if matches!((&update, ids.rank()), (BatchUpdate::Rows(_), 1)) {
            bail!(
                "the ids are {:?}, expected (rows, ..): with an adapter for each row they do not tell whether they \
                 are of the rows or, as positions are, of all rows: unsqueeze them",
                ids.dims()
            )
        }
        update.apply(ids, |ids, update| ops::embedding(ids, &weight, update, self.kind.padding_idx))
    }
}

/// An embedding of `num` rows of `dim` values, its base and adapter from `vb`: `weight`, `lora_A`,
/// `lora_B`.
///
/// # Errors
/// If an option is out of range or not supported (`lora_dropout`, `fan_in_fan_out`, `lora_bias`), or `vb` lacks a
/// tensor or has it in another shape.
pub fn embedding(num: usize, dim: usize, cfg: LoraConfig, vb: VarBuilder) -> Result<Embedding> {
    let init = Init::Randn { mean: 0., stdev: 1. };
    let weight = vb.get_with_hints((num, dim), "weight", init)?;
    Embedding::new(candle_nn::Embedding::new(weight, dim), cfg, vb)
}
