//! Text as sequences of bytes, of which each is predicted from those before it.

use crate::corpus::cafes;
use crate::Result;
use candle_core::{Device, Tensor};
use std::fs;
use std::path::Path;

/// A label that does not count.
const IGNORED: i64 = -100;

/// The text of a file, or the embedded one.
pub fn text(path: Option<&Path>) -> Result<String> {
    match path {
        Some(path) => Ok(fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?),
        None => {
            let lines = cafes(500)?;
            let lines =
                lines.iter().map(|line| format!("{}||{}\n", line.description, line.sentence));
            Ok(lines.collect())
        }
    }
}

/// The sequences of a text: all of `context` bytes but the last, which may be shorter.
pub fn sequences(text: &str, context: usize) -> Result<Vec<&[u8]>> {
    if context == 0 || text.len() < 2 {
        let message = format!("{} bytes of text in sequences of {context}", text.len());
        return Err(format!("{message}: nothing to predict").into());
    }
    // Each also has the byte that its last one predicts.
    let starts = (0..text.len() - 1).step_by(context);
    Ok(starts.map(|at| &text.as_bytes()[at..text.len().min(at + context + 1)]).collect())
}

pub struct Batch {
    /// (sequences, bytes), padded on the right.
    pub ids: Tensor,
    /// The next byte at each place, (sequences, bytes).
    pub labels: Tensor,
    /// Labels that count.
    pub predicted: usize,
}

impl Batch {
    /// `None` without sequences.
    pub fn new(sequences: &[&[u8]], device: &Device) -> Result<Option<Self>> {
        let Some(width) = sequences.iter().map(|s| s.len() - 1).max() else { return Ok(None) };
        let (mut ids, mut labels, mut predicted) = (vec![], vec![], 0);
        for (i, sequence) in sequences.iter().enumerate() {
            predicted += sequence.len() - 1;
            ids.extend(sequence[..sequence.len() - 1].iter().map(|byte| u32::from(*byte)));
            ids.resize((i + 1) * width, 0);
            labels.extend(sequence[1..].iter().map(|byte| i64::from(*byte)));
            labels.resize((i + 1) * width, IGNORED);
        }
        let shape = (sequences.len(), width);
        let ids = Tensor::from_vec(ids, shape, device)?;
        Ok(Some(Self { ids, labels: Tensor::from_vec(labels, shape, device)?, predicted }))
    }
}
