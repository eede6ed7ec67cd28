//! Rows of a table that are trained in place of the base's, PEFT's `trainable_token_indices`.

use super::binding::placeholder::Base;
use super::config::LoraConfig;
use super::initial::set;
use super::names::Part;
use crate::ops::{compute_dtype, is_finite, LowRank, Matrix, Split};
use candle_core::{bail, Result, Tensor};
use candle_nn::init::ZERO;
use candle_nn::VarBuilder;

/// The rows of a weight (num, dim), of an embedding or of the head that is tied to it.
#[derive(Debug, Clone)]
pub(crate) struct TokenRows {
    /// (rows, dim), as they are trained.
    rows: Tensor,
    /// The base's (rows, dim), in the compute dtype.
    originals: Tensor,
    /// 1 where the i-th of the num rows is the j-th of these, (num, rows).
    which: Tensor,
    indices: Vec<u32>,
}

impl TokenRows {
    /// `trainable_tokens` (rows, dim) from `vb`, new ones with the base's values.
    pub fn new(base: &Base, indices: &[usize], cfg: &LoraConfig, vb: &VarBuilder) -> Result<Self> {
        let (num, dim) = base.tensor().dims2()?;
        if indices.is_empty() {
            bail!("trainable_token_indices is empty")
        }
        for (i, index) in indices.iter().enumerate() {
            if *index >= num {
                bail!(
                    "trainable_token_indices[{i}] is {index}, the table has {num} rows: `base::resized_embeddings` adds \
                     those of new tokens"
                )
            }
            if indices[..i].contains(index) {
                bail!("trainable_token_indices has {index} twice")
            }
        }
        let (device, name) = (base.tensor().device(), Part::TokenRows.name());
        let (count, ids): (_, Vec<_>) =
            (indices.len(), indices.iter().map(|i| *i as u32).collect());
        let which = ids.iter().enumerate().map(|(row, id)| *id as usize * count + row);
        let which = Tensor::from_iter(which.map(|at| at as u32), device)?;
        let dtype = base.tensor().dtype();
        let compute = compute_dtype(dtype);
        let ones = Tensor::ones(count, compute, device)?;
        let which = Tensor::zeros(num * count, compute, device)?.index_add(&which, &ones, 0)?;
        let at = Tensor::new(&ids[..], device)?;
        let originals = match base.matrix()? {
            Matrix::Dense(table) => table.contiguous()?.index_select(&at, 0)?,
            Matrix::Quantized(table) => table.rows(&at)?,
        };
        let originals = originals.to_dtype(compute)?.detach();
        let (is_new, dtype) = (!vb.contains_tensor(name), cfg.adapter_dtype(dtype));
        let mut rows = vb.get_with_hints_dtype((count, dim), name, ZERO, dtype)?;
        if is_new {
            set(&mut rows, originals.to_dtype(dtype)?)?;
        }
        Ok(Self { rows, originals, which: which.reshape((num, count))?, indices: ids })
    }

    /// The rows as they are trained.
    pub fn trained(&self) -> &Tensor {
        &self.rows
    }

    /// What they add to the base, as an update of the rank of their number: the changes of the rows times which they
    /// are; `transposed` for an embedding.
    pub fn update(&self, transposed: bool) -> Result<LowRank> {
        // A copy, since an optimizer may write the variable; see `LowRank::copied`.
        let rows = if self.rows.is_variable() { self.rows.copy()? } else { self.rows.clone() };
        let changes = (rows.to_dtype(self.originals.dtype())? - &self.originals)?;
        let (a, b) = match transposed {
            true => (self.which.t()?, changes.t()?),
            false => (changes, self.which.clone()),
        };
        let (ranks, outputs) = (0..a.dim(0)?, 0..b.dim(0)?);
        let split = Split { outputs: outputs.clone(), ranks, b_rows: outputs };
        Ok(LowRank::new(a, b, 1., 0., vec![split]))
    }

    /// The table (num, dim) with these rows, without a graph.
    pub fn merged(&self, table: &Tensor) -> Result<Tensor> {
        let rows = self.rows.copy()?.detach().to_dtype(table.dtype())?;
        if !is_finite(&rows)? {
            bail!("the trained rows {:?} in {:?} are not finite", self.indices, rows.dtype())
        }
        let at = Tensor::new(&self.indices[..], table.device())?.unsqueeze(1)?;
        let merged = table.detach().force_contiguous()?; // a copy: the base is never written
        merged.scatter_set(&at.broadcast_as(rows.shape())?.contiguous()?, &rows, 0)?;
        Ok(merged)
    }
}
