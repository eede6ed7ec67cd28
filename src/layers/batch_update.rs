//! The update of one forward: of all rows of the input, or each row's own.

use crate::ops::LowRank;
use candle_core::{bail, Result, Tensor};

#[derive(Debug, Clone)]
pub(crate) enum BatchUpdate {
    /// Of all rows, or none.
    Whole(Option<LowRank>),
    /// Of consecutive rows along the input's first dimension, in order: their number and their update.
    Rows(Vec<(usize, Option<LowRank>)>),
}

impl BatchUpdate {
    /// See [`LowRank::copied`]. Those of rows do not train.
    pub fn copied(self) -> Result<Self> {
        Ok(match self {
            Self::Whole(Some(update)) => Self::Whole(Some(update.copied()?)),
            update => update,
        })
    }

    /// `f` of the input, or of all groups of its rows, one after another.
    pub fn apply(
        &self,
        x: &Tensor,
        f: impl Fn(&Tensor, Option<&LowRank>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let groups = match self {
            Self::Whole(update) => return f(x, update.as_ref()),
            Self::Rows(groups) => groups,
        };
        let rows: usize = groups.iter().map(|(n, _)| n).sum();
        if x.dims().first() != Some(&rows) {
            bail!(
                "the input is {:?}, expected ({rows}, ..): {rows} rows have their adapters",
                x.dims()
            )
        }
        let mut start = 0;
        let outputs = groups.iter().map(|(n, update)| {
            let group = x.narrow(0, start, *n)?;
            start += n;
            f(&group, update.as_ref())
        });
        Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)
    }
}
