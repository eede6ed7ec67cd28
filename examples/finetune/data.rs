//! Lines as tokens, and batches of them.

use crate::bpe::{Bpe, END};
use crate::corpus::Line;
use crate::Result;
use candle_core::{Device, Tensor};

/// The label of what is not predicted.
const IGNORED: i64 = -100;

/// Lines of similar lengths, padded on the right. As in the paper's code only the sentences' tokens and the end behind
/// them are predicted; the descriptions are given.
pub struct Batch {
    /// (batch, tokens)
    pub ids: Tensor,
    /// The token after each, (batch, tokens), or -100 where it is given or padding.
    pub labels: Tensor,
    /// How many tokens are predicted.
    pub predicted: usize,
    /// Tokens that are not padding.
    pub tokens: usize,
}

/// What a sentence is to follow: the description and the end token.
pub fn prompt(description: &str, bpe: &Bpe) -> Vec<u32> {
    [bpe.encode(description), vec![END]].concat()
}

/// A line's tokens, and how many of them are given.
fn encode(line: &Line, bpe: &Bpe) -> (Vec<u32>, usize) {
    let prompt = prompt(&line.description, bpe);
    let sentence = bpe.encode(&format!(" {}", line.sentence));
    let given = prompt.len();
    ([prompt, sentence, vec![END]].concat(), given)
}

/// The most tokens of a line.
pub fn longest(lines: &[Line], bpe: &Bpe) -> usize {
    lines.iter().map(|line| encode(line, bpe).0.len()).max().unwrap_or(0)
}

/// Batches of 8 lines.
pub fn batches(lines: &[Line], bpe: &Bpe, device: &Device) -> Result<Vec<Batch>> {
    let mut examples: Vec<_> = lines.iter().map(|line| encode(line, bpe)).collect();
    examples.sort_by_key(|(ids, _)| ids.len());
    examples.chunks(8).map(|examples| Batch::new(examples, device)).collect()
}

impl Batch {
    fn new(examples: &[(Vec<u32>, usize)], device: &Device) -> Result<Self> {
        let width = examples.iter().map(|(ids, _)| ids.len() - 1).max().unwrap_or(0);
        let (mut inputs, mut labels, mut tokens, mut predicted) = (vec![], vec![], 0, 0);
        for (i, (ids, given)) in examples.iter().enumerate() {
            tokens += ids.len() - 1;
            predicted += ids.len() - given;
            inputs.extend_from_slice(&ids[..ids.len() - 1]);
            labels.resize(i * width + given - 1, IGNORED);
            labels.extend(ids[*given..].iter().map(|&id| i64::from(id)));
            inputs.resize((i + 1) * width, 0);
            labels.resize((i + 1) * width, IGNORED);
        }
        let shape = (examples.len(), width);
        let ids = Tensor::from_vec(inputs, shape, device)?;
        Ok(Self { ids, labels: Tensor::from_vec(labels, shape, device)?, predicted, tokens })
    }
}
