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
            None => corpus::hotels(800)?,
        };
        let (train, valid) = match (&args.train, &args.valid) {
            (Some(train), Some(valid)) => (data::read(train)?, data::read(valid)?),
            _ => {
                let mut train = corpus::cafes(600)?;
                let valid = train.split_off(500);
                (train, valid)
            }
        };
        Ok(match args.quick {
            true => Self {
                pretrain: thinned(pretrain, 300),
                train: thinned(train, 200),
                valid: thinned(valid, 40),
            },
            false => Self { pretrain, train, valid },
        })
    }
}

/// About `n` lines, evenly from all of them: files are often sorted.
fn thinned(lines: Vec<Line>, n: usize) -> Vec<Line> {
    let step = lines.len().div_ceil(n).max(1);
    lines.into_iter().step_by(step).collect()
}
