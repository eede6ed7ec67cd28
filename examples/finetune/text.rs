//! The lines that the flags ask for: the user's files or the embedded text.

use crate::args::Args;
use crate::corpus;
use crate::data::{self, Line};
use crate::Result;

pub struct Text {
    pub pretrain: Vec<Line>,
    pub train: Vec<Line>,
    pub valid: Vec<Line>,
}

impl Text {
    /// All of it at once: a malformed line should not show after minutes of training.
    pub fn read(args: &Args) -> Result<Self> {
        let pretrain = match &args.pretrain {
            Some(path) => data::read(path)?,
            None => corpus::hotels(7000)?,
        };
        let (train, valid) = match (&args.train, &args.valid) {
            (Some(train), Some(valid)) => (data::read(train)?, data::read(valid)?),
            _ => (corpus::cafes(7000)?, corpus::other_cafes(100)?),
        };
        Ok(match args.quick {
            true => Self {
                pretrain: thinned(&pretrain, 300),
                train: thinned(&train, 200),
                valid: thinned(&valid, 40),
            },
            false => Self { pretrain, train, valid },
        })
    }
}

/// At most `n` lines, evenly from all of them: files are often sorted.
pub fn thinned(lines: &[Line], n: usize) -> Vec<Line> {
    let step = lines.len().div_ceil(n).max(1);
    lines.iter().step_by(step).cloned().collect()
}
