//! Examples in rows of a length, and rows as tensors.

use super::examples::Example;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;

/// The label of what is not predicted.
const IGNORED: i64 = -100;

/// Examples that share a row: none sees another.
pub type Row<'a> = Vec<&'a Example>;

/// Rows of examples one after another, without padding.
pub struct Batch {
    /// (1, tokens)
    pub ids: Tensor,
    /// The token after each, (1, tokens), or -100 where it is given.
    pub labels: Tensor,
    /// The tokens of each example.
    pub lens: Vec<usize>,
    /// How many tokens are predicted.
    pub predicted: usize,
}

impl Batch {
    pub fn new(rows: &[Row], device: &Device) -> Result<Self> {
        let (mut ids, mut labels, mut lens, mut predicted) = (vec![], vec![], vec![], 0);
        for example in rows.iter().flatten() {
            lens.push(example.inputs());
            predicted += example.predicted();
            ids.extend_from_slice(&example.ids[..example.inputs()]);
            let next = example.ids.iter().zip(&example.learned).skip(1);
            labels
                .extend(next.map(|(id, learned)| if *learned { i64::from(*id) } else { IGNORED }));
        }
        let shape = (1, ids.len());
        Ok(Self {
            ids: Tensor::from_vec(ids, shape, device)?,
            labels: Tensor::from_vec(labels, shape, device)?,
            lens,
            predicted,
        })
    }

    /// How many tokens the model reads.
    pub fn tokens(&self) -> usize {
        self.lens.iter().sum()
    }
}

/// Rows of at most `length` tokens with as many examples as they hold, or without `length` of one example each. With an
/// `rng` in random order.
pub fn rows<'a>(
    examples: &'a [Example],
    length: Option<usize>,
    mut rng: Option<&mut Rng>,
) -> Vec<Row<'a>> {
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
