//! An encoder's training data: pairs of sentences, or sentences with labels.

use super::batch::{Batch, Rows};
use super::columns::Columns;
use super::entries::{entries, shortened, Entry};
use crate::encoder::{Base, Task};
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor};
use serde_json::Value;
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// An entry of a data file, by what is to be learned.
pub enum Sentences {
    /// Of a query, of a sentence near it, and perhaps of one that is not.
    Pair(Vec<String>),
    Labelled(String, String),
}

const EXPECTED: &str =
    "an encoder learns from \"text\" and \"label\", or from \"anchor\", \"positive\" and perhaps \
                        \"negative\"; --columns gives other names";

/// The entries of JSON Lines or of a JSON array, all of one form, with where they stand. An error names the file and the
/// line.
pub fn read(path: &Path, columns: &Columns) -> Result<Vec<(String, Sentences)>> {
    let mut all: Vec<(String, Sentences)> = vec![];
    for (at, entry) in entries(path)? {
        let Entry::Json(json) = entry else { return Err(format!("{at}: {EXPECTED}").into()) };
        let read = from_json(&json, columns).and_then(|read| match all.first() {
            Some((first, of)) if of.is_pair() != read.is_pair() => {
                Err(format!("it is of another form than {first}").into())
            }
            _ => Ok(read),
        });
        let read = read.map_err(|e| format!("{at}: {e}: {}", shortened(&json.to_string())))?;
        all.push((at, read));
    }
    Ok(all)
}

fn from_json(json: &Value, columns: &Columns) -> Result<Sentences> {
    if let Some(missing) = columns.missing(json) {
        return Err(format!("no column {missing:?}").into());
    }
    let text = |name: &str| columns.text(json, name).filter(|text| !text.trim().is_empty());
    if let (Some(anchor), Some(positive)) = (text("anchor"), text("positive")) {
        if anchor == positive {
            return Err("the anchor is the positive".into());
        }
        if let Some(other) =
            json.as_object().and_then(|all| all.keys().find(|key| key.starts_with("negative_")))
        {
            return Err(
                format!("a pair has one negative: --columns negative={other} chooses it").into()
            );
        }
        let negative = match columns.of(json, "negative") {
            Value::Null => None,
            Value::String(negative) => {
                Some(negative.clone()).filter(|text| !text.trim().is_empty())
            }
            other => return Err(format!("the negative is {other}, expected a text").into()),
        };
        if negative.as_ref() == Some(&positive) {
            return Err("the negative is the positive".into());
        }
        return Ok(Sentences::Pair([anchor, positive].into_iter().chain(negative).collect()));
    }
    let label = match columns.of(json, "label") {
        Value::String(label) => Some(label.clone()),
        label @ (Value::Number(_) | Value::Bool(_)) => Some(label.to_string()),
        _ => None,
    };
    match (text("text"), label) {
        (Some(text), Some(label)) => Ok(Sentences::Labelled(text, label)),
        _ => Err(EXPECTED.into()),
    }
}

impl Sentences {
    pub fn is_pair(&self) -> bool {
        matches!(self, Self::Pair(_))
    }

    fn texts(&self) -> &[String] {
        match self {
            Self::Pair(texts) => texts,
            Self::Labelled(text, _) => std::slice::from_ref(text),
        }
    }
}

/// The different labels: numbers by their values, then texts in their order.
pub fn labels<'a>(entries: impl Iterator<Item = &'a (String, Sentences)>) -> Vec<String> {
    let label = |(_, entry): &(_, Sentences)| match entry {
        Sentences::Labelled(_, label) => Some(label.clone()),
        Sentences::Pair(_) => None,
    };
    let mut labels: Vec<_> = entries.filter_map(label).collect();
    let value = |label: &String| label.parse::<f64>().ok().filter(|value| value.is_finite());
    labels.sort_by(|a, b| match (value(a), value(b)) {
        (Some(x), Some(y)) => x.total_cmp(&y).then_with(|| a.cmp(b)),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => a.cmp(b),
    });
    labels.dedup();
    labels
}

/// Sentences as tokens.
pub struct Example {
    pub texts: Vec<Vec<u32>>,
    /// Its number, or 0 for a pair.
    pub label: u32,
}

/// The examples of a file, and what became of its entries.
pub struct Examples {
    pub all: Vec<Example>,
    /// Sentences that were cut off.
    pub cut: usize,
    /// Where the pairs stand of which the model reads a sentence twice: case, or what was cut off, told them apart.
    pub same: Vec<String>,
}

/// An error for a label that is none of the task's.
pub fn examples(entries: &[(String, Sentences)], task: &Task, base: &Base) -> Result<Examples> {
    let (mut all, mut cut, mut same) = (vec![], 0, vec![]);
    for (at, entry) in entries {
        let mut texts = vec![];
        for text in entry.texts() {
            let (ids, is_cut) = base.encode(text).map_err(|e| format!("{at}: {e}"))?;
            if ids.is_empty() {
                return Err(format!("{at}: a sentence without tokens: {text:?}").into());
            }
            cut += usize::from(is_cut);
            texts.push(ids);
        }
        if (1..texts.len()).any(|i| texts[..i].contains(&texts[i])) {
            same.push(at.clone());
            continue;
        }
        let label = match (task, entry) {
            (Task::Classify(labels), Sentences::Labelled(_, label)) => {
                let label = labels.iter().position(|known| known == label).ok_or_else(|| {
                    format!("{at}: the label {label:?} is none of those to train on: {labels:?}")
                });
                label? as u32
            }
            (Task::Embed(_), Sentences::Pair(_)) => 0,
            _ => return Err(format!("{at}: it is of another form than what is trained on").into()),
        };
        all.push(Example { texts, label });
    }
    match (all.is_empty(), same.first()) {
        (true, Some(at)) => {
            Err(format!("{at}: no pair has sentences that differ as the model reads them").into())
        }
        _ => Ok(Examples { all, cut, same }),
    }
}

/// Batches of labelled sentences, whose labels are (batch); or of pairs, first the queries, then the sentences near them,
/// then those that are not.
pub struct Sampled<'a> {
    pub examples: &'a [Example],
    /// The most examples of a batch. In one of pairs no sentence is there twice: it would be its own negative.
    pub batch: usize,
}

impl<'a> Sampled<'a> {
    /// All examples, with an `rng` in random order.
    pub fn batches(&self, rng: Option<&mut Rng>) -> Vec<Vec<&'a Example>> {
        let mut all: Vec<_> = self.examples.iter().collect();
        if let Some(rng) = rng {
            rng.shuffle(&mut all);
        }
        match all.first() {
            Some(first) if first.texts.len() > 1 => without_twins(all, self.batch),
            _ => all.chunks(self.batch).map(<[_]>::to_vec).collect(),
        }
    }
}

/// Whether a batch has a loss: a pair alone has nothing that its sentence could be told from.
pub fn has_loss(batch: &[&Example]) -> bool {
    batch.len() > 1 || batch.iter().any(|example| example.texts.len() != 2)
}

impl<'a> Rows for Sampled<'a> {
    /// A batch with a loss.
    type Row = Vec<&'a Example>;
    type Batch = Batch;

    fn rows(&self, rng: Option<&mut Rng>) -> Vec<Self::Row> {
        let mut batches = self.batches(rng);
        batches.retain(|batch| has_loss(batch));
        batches
    }

    fn batch(&self, rows: &[Self::Row], device: &Device) -> Result<Batch> {
        let (mut ids, mut lens, rows) = (vec![], vec![], rows.concat());
        // Of all examples the first sentence, then of all the second.
        let most = rows.iter().map(|row| row.texts.len()).max().unwrap_or(0);
        for text in (0..most).flat_map(|i| rows.iter().filter_map(move |row| row.texts.get(i))) {
            ids.extend_from_slice(text);
            lens.push(text.len());
        }
        let labels = Tensor::from_iter(rows.iter().map(|row| row.label), device)?;
        let count = ids.len();
        let ids = Tensor::from_vec(ids, (1, count), device)?;
        Ok(Batch { ids, labels, lens, counted: rows.len() })
    }
}

/// All examples in batches of at most this size, of which none has a sentence twice: each in the first that has room for it
/// after those that have one of its sentences.
fn without_twins(all: Vec<&Example>, batch: usize) -> Vec<Vec<&Example>> {
    let (mut batches, mut open) = (Vec::<Vec<_>>::new(), BTreeSet::new());
    let mut after = HashMap::<&[u32], usize>::new();
    for example in all {
        let from = example.texts.iter().filter_map(|text| after.get(&text[..]).copied()).max();
        let at = open.range(from.unwrap_or(0)..).next().copied().unwrap_or(batches.len());
        if at == batches.len() {
            batches.push(vec![]);
            open.insert(at);
        }
        batches[at].push(example);
        if batches[at].len() == batch {
            open.remove(&at);
        }
        after.extend(example.texts.iter().map(|text| (&text[..], at + 1)));
    }
    batches
}
