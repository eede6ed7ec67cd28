//! Lines of `label<tab>sentence`, and batches of them.

use crate::base::Base;
use crate::Result;
use candle_core::{Device, Tensor};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A label and a sentence, and where they stand.
pub struct Line {
    at: String,
    label: String,
    sentence: String,
}

/// The lines of a file that are not blank. An error names the file and the line.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut lines = vec![];
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = format!("{}:{}", path.display(), i + 1);
        let Some((label, sentence)) = line.split_once('\t') else {
            return Err(format!("{at}: no tab, expected `label<tab>sentence`: {line:?}").into());
        };
        let (label, sentence) = (label.trim().to_owned(), sentence.trim().to_owned());
        lines.push(Line { at, label, sentence });
    }
    match lines.is_empty() {
        true => Err(format!("{}: no lines", path.display()).into()),
        false => Ok(lines),
    }
}

/// The different labels, sorted.
pub fn labels(lines: &[Line]) -> Vec<String> {
    let labels: BTreeSet<_> = lines.iter().map(|line| line.label.clone()).collect();
    labels.into_iter().collect()
}

pub struct Example {
    ids: Vec<u32>,
    label: u32,
}

/// An error for a label that is none of `labels`.
pub fn encode(lines: &[Line], labels: &[String], base: &Base) -> Result<Vec<Example>> {
    let encode = |line: &Line| {
        let label = labels.iter().position(|label| *label == line.label).ok_or_else(|| {
            format!("{}: the label {:?} is none of {labels:?}", line.at, line.label)
        })?;
        Ok(Example { ids: base.encode(&line.sentence)?, label: label as u32 })
    };
    lines.iter().map(encode).collect()
}

/// Examples of similar lengths, padded on the right.
pub struct Batch {
    /// (batch, tokens)
    pub ids: Tensor,
    /// 1 for tokens and 0 for padding, (batch, tokens); `None` where there is none.
    pub real: Option<Tensor>,
    /// (batch)
    pub labels: Tensor,
}

impl Batch {
    fn new(examples: &[&Example], device: &Device) -> Result<Self> {
        let labels: Vec<_> = examples.iter().map(|e| e.label).collect();
        let sentences: Vec<_> = examples.iter().map(|e| &e.ids[..]).collect();
        let (ids, real) = padded(&sentences, device)?;
        Ok(Self { ids, real, labels: Tensor::new(labels, device)? })
    }
}

/// Sentences as (batch, tokens), and which of these are real.
pub fn padded(sentences: &[&[u32]], device: &Device) -> Result<(Tensor, Option<Tensor>)> {
    let width = sentences.iter().map(|ids| ids.len()).max().unwrap_or(0);
    let shape = (sentences.len(), width);
    let mut ids = vec![];
    for (i, sentence) in sentences.iter().enumerate() {
        ids.extend_from_slice(sentence);
        ids.resize((i + 1) * width, 0);
    }
    let ids = Tensor::from_vec(ids, shape, device)?;
    if sentences.iter().all(|ids| ids.len() == width) {
        return Ok((ids, None));
    }
    let real =
        |ids: &&[u32]| (0..width).map(|i| f32::from(u8::from(i < ids.len()))).collect::<Vec<_>>();
    let real = sentences.iter().flat_map(real).collect();
    Ok((ids, Some(Tensor::from_vec(real, shape, device)?)))
}

/// Batches of examples of similar lengths.
pub fn batches(examples: &[Example], size: usize, device: &Device) -> Result<Vec<Batch>> {
    let mut sorted: Vec<_> = examples.iter().collect();
    sorted.sort_by_key(|example| example.ids.len());
    sorted.chunks(size).map(|examples| Batch::new(examples, device)).collect()
}
