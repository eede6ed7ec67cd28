//! Lines of `field : value | ..||sentence`, and batches of them.

use crate::buckets::buckets;
use crate::lines::lines;
use crate::rng::Rng;
use crate::slots::values;
use crate::tokenizer::Tokenizer;
use crate::Result;
use candle_core::{Device, Tensor};
use std::path::Path;

pub use crate::corpus::Line;

/// The lines of a file; empty ones are skipped. An error names the file and the line.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    lines(path)?.into_iter().map(|(at, line)| parse(at, &line)).collect()
}

fn parse(at: String, line: &str) -> Result<Line> {
    let bad = |why: &str| format!("{at}: {why}, expected `field : value | ..||sentence`: {line:?}");
    let (description, sentence) = line.split_once("||").ok_or_else(|| bad("no `||`"))?;
    check_description(description).map_err(|why| bad(&why))?;
    match sentence.trim() {
        "" => Err(bad("no sentence").into()),
        sentence if sentence.contains("||") => Err(bad("two `||`").into()),
        sentence => {
            let (description, sentence) = (description.trim().to_owned(), sentence.to_owned());
            let slots = values(&description).map(|value| vec![value.to_owned()]).collect();
            Ok(Line { at, description, sentence, slots })
        }
    }
}

/// An error that says which part of a description is no `field : value`.
pub fn check_description(description: &str) -> std::result::Result<(), String> {
    let is_field = |part: &str| {
        part.split_once(':').is_some_and(|(f, v)| !f.trim().is_empty() && !v.trim().is_empty())
    };
    match description.split('|').find(|part| !is_field(part)) {
        Some(part) => Err(format!("{:?} is no `field : value`", part.trim())),
        None => Ok(()),
    }
}

/// A line's tokens: description, end, sentence, end.
pub struct Example {
    pub ids: Vec<u32>,
    /// Where the sentence begins.
    pub start: usize,
}

/// An error if a line is longer than the model's positions.
pub fn encode(lines: &[Line], tokenizer: &Tokenizer, positions: usize) -> Result<Vec<Example>> {
    let encode = |line: &Line| {
        let mut ids = tokenizer.prompt(&line.description)?;
        let start = ids.len();
        ids.extend(tokenizer.encode(&format!(" {}", line.sentence))?);
        ids.push(tokenizer.end());
        match ids.len() > positions {
            true => {
                Err(format!("{}: {} tokens, the model takes {positions}", line.at, ids.len())
                    .into())
            }
            false => Ok(Example { ids, start }),
        }
    };
    lines.iter().map(encode).collect()
}

/// Examples of similar lengths, padded on the right. As in the paper's code only the sentences'
/// tokens and the end behind them are predicted; the descriptions are given.
pub struct Batch {
    /// (batch, tokens)
    pub ids: Tensor,
    /// Where in the flattened ids the next token is predicted, and what it is.
    pub rows: Tensor,
    pub targets: Tensor,
    /// Tokens that are not padding.
    pub tokens: usize,
}

impl Batch {
    fn new(examples: &[&Example], device: &Device) -> Result<Self> {
        let width = examples.iter().map(|e| e.ids.len() - 1).max().unwrap_or(0);
        let (mut ids, mut rows): (Vec<u32>, Vec<u32>) = (vec![], vec![]);
        let (mut targets, mut tokens): (Vec<u32>, _) = (vec![], 0);
        for (i, e) in examples.iter().enumerate() {
            let inputs = &e.ids[..e.ids.len() - 1];
            tokens += inputs.len();
            ids.extend(inputs);
            ids.resize((i + 1) * width, 0);
            rows.extend((e.start - 1..inputs.len()).map(|row| (i * width + row) as u32));
            targets.extend(&e.ids[e.start..]);
        }
        Ok(Self {
            ids: Tensor::from_vec(ids, (examples.len(), width), device)?,
            rows: Tensor::new(rows, device)?,
            targets: Tensor::new(targets, device)?,
            tokens,
        })
    }

    /// How many tokens are predicted.
    pub fn predicted(&self) -> usize {
        self.targets.elem_count()
    }
}

/// Batches of examples of similar lengths, in a random order if there is an `rng`.
pub fn batches(
    examples: &[Example],
    size: usize,
    rng: Option<&mut Rng>,
    device: &Device,
) -> Result<Vec<Batch>> {
    let groups = buckets(examples, size, |e| e.ids.len(), rng);
    groups.into_iter().map(|group| Batch::new(&group, device)).collect()
}
