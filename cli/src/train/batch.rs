//! Examples in rows of a length, and rows as tensors.

use super::examples::Example;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;

/// The label of what is not predicted.
pub const IGNORED: i64 = -100;

/// Texts one after another, without padding, and what is to be said of them.
pub struct Batch {
    /// (1, tokens)
    pub ids: Tensor,
    /// The tokens of each text.
    pub lens: Vec<usize>,
    /// A model's answers; [`Rows`] says which.
    pub labels: Tensor,
    /// Over how many labels the loss is a mean.
    pub counted: usize,
}

impl Batch {
    /// How many tokens the model reads.
    pub fn tokens(&self) -> usize {
        self.lens.iter().sum()
    }
}

impl AsRef<Batch> for Batch {
    fn as_ref(&self) -> &Batch {
        self
    }
}

/// The examples of a run.
pub trait Rows {
    /// What a batch has a number of.
    type Row;

    /// What a loss is computed from.
    type Batch: AsRef<Batch>;

    /// All rows, with an `rng` in random order.
    fn rows(&self, rng: Option<&mut Rng>) -> Vec<Self::Row>;

    fn batch(&self, rows: &[Self::Row], device: &Device) -> Result<Self::Batch>;
}

/// A language model's examples, of which as many as fit share a row of `length` tokens, or each has one of its own without
/// a length. The labels (1, tokens) are the token after each, or -100 where it is given.
pub struct Packed<'a> {
    pub examples: &'a [Example],
    pub length: Option<usize>,
}

impl<'a> Rows for Packed<'a> {
    /// None sees another.
    type Row = Vec<&'a Example>;
    type Batch = Batch;

    fn rows(&self, rng: Option<&mut Rng>) -> Vec<Self::Row> {
        rows(self.examples, self.length, rng)
    }

    fn batch(&self, rows: &[Self::Row], device: &Device) -> Result<Batch> {
        let (mut ids, mut labels, mut lens, mut counted) = (vec![], vec![], vec![], 0);
        for example in rows.iter().flatten() {
            lens.push(example.inputs());
            counted += example.predicted();
            ids.extend_from_slice(&example.ids[..example.inputs()]);
            let next = example.ids.iter().zip(&example.learned).skip(1);
            labels
                .extend(next.map(|(id, learned)| if *learned { i64::from(*id) } else { IGNORED }));
        }
        let shape = (1, ids.len());
        let ids = Tensor::from_vec(ids, shape, device)?;
        Ok(Batch { ids, labels: Tensor::from_vec(labels, shape, device)?, lens, counted })
    }
}

/// Rows of at most `length` tokens with as many examples as they hold, or without `length` of one example each. With an
/// `rng` in random order.
fn rows<'a>(
    examples: &'a [Example],
    length: Option<usize>,
    mut rng: Option<&mut Rng>,
) -> Vec<Vec<&'a Example>> {
    let mut all: Vec<_> = examples.iter().collect();
    if let Some(rng) = &mut rng {
        rng.shuffle(&mut all);
    }
    let Some(length) = length else {
        return all.into_iter().map(|example| vec![example]).collect();
    };
    // The longest first, each into the fullest row that has room for it.
    all.sort_by_key(|example| std::cmp::Reverse(example.inputs()));
    let (mut rows, mut by_room) = (vec![], BTreeMap::<usize, Vec<usize>>::new());
    for example in all {
        let inputs = example.inputs();
        let room = by_room.range(inputs..).next().map(|(room, _)| *room);
        let row = room.and_then(|room| {
            let rows = by_room.get_mut(&room)?;
            let row = rows.pop();
            if rows.is_empty() {
                by_room.remove(&room);
            }
            Some((room, row?))
        });
        let (room, row) = row.unwrap_or_else(|| {
            rows.push(vec![]);
            (length.max(inputs), rows.len() - 1)
        });
        rows[row].push(example);
        by_room.entry(room - inputs).or_default().push(row);
    }
    if let Some(rng) = &mut rng {
        rng.shuffle(&mut rows);
    }
    rows
}
