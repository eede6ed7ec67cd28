//! The factors of a layer in an adapter's file: with the base's order of rows, and swapped for the embedding.

use crate::gguf::architecture::MODEL;
use crate::gguf::file::File;
use crate::gguf::names::Names;
use crate::gguf::rows;
use crate::{Error, Result};
use candle_core::{bail, Tensor};

/// Where the factors of a layer belong.
pub(super) struct Place {
    /// The file's name of the weight.
    pub weight: String,
    /// The layer's inputs and outputs: for an embedding the words and the columns.
    sizes: (usize, usize),
    pub embedding: bool,
    interleaved: Option<usize>,
}

impl Place {
    /// The place of factors for a weight of the base, by the file's name.
    pub fn find(base: &File, names: &Names, weight: &str) -> Result<Self> {
        let &[rows, columns] = base.info(weight)?.dims.as_slice() else {
            return Err(Error::tensor(weight, "it is not a matrix"));
        };
        let embedding = weight == MODEL[0].0;
        let sizes = if embedding { (rows, columns) } else { (columns, rows) };
        let interleaved = names.interleaved(weight);
        Ok(Self { weight: weight.to_owned(), sizes, embedding, interleaved })
    }

    /// The factors (r, in) and (out, r) as in a file.
    pub fn written(&self, a: &Tensor, b: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        self.check(a, b)?;
        let order = self.order(rows::in_hugging_face)?;
        let a = if self.embedding { a.t()?.contiguous()? } else { a.clone() };
        Ok((a, ordered(b, order)?))
    }

    /// A file's factors as (r, in) and (out, r).
    pub fn read(&self, a: &Tensor, b: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let a = if self.embedding { a.t()?.contiguous()? } else { a.clone() };
        self.check(&a, b)?;
        Ok((a, ordered(b, self.order(rows::in_file)?)?))
    }

    fn check(&self, a: &Tensor, b: &Tensor) -> candle_core::Result<()> {
        let (inputs, outputs) = self.sizes;
        match (a.dims(), b.dims()) {
            (&[r, own_inputs], &[own_outputs, own_r])
                if r > 0 && r == own_r && (own_inputs, own_outputs) == self.sizes =>
            {
                Ok(())
            }
            (a, b) => bail!(
                "lora_A {a:?} and lora_B {b:?} do not fit its {inputs} inputs and {outputs} outputs"
            ),
        }
    }

    /// The order of the rows of B.
    fn order(
        &self,
        order: impl FnOnce(usize, usize) -> Option<Vec<usize>>,
    ) -> candle_core::Result<Option<Vec<usize>>> {
        let (rows, Some(heads)) = (self.sizes.1, self.interleaved) else { return Ok(None) };
        match order(rows, heads) {
            Some(order) => Ok(Some(order)),
            None => bail!("its {rows} rows are not those of {heads} heads of pairs"),
        }
    }
}

fn ordered(b: &Tensor, order: Option<Vec<usize>>) -> candle_core::Result<Tensor> {
    order.map_or_else(|| Ok(b.clone()), |order| rows::selected(b, order))
}
