//! The table at the end, and the same as JSON.

use crate::evaluate::Score;
use serde_json::{json, Value};
use std::fmt;
use std::time::Duration;

/// What one method came to.
pub struct Row {
    pub method: &'static str,
    pub trainable: usize,
    /// Of the checkpoint.
    pub bytes: u64,
    pub score: Score,
    /// The median.
    pub step: Duration,
}

pub struct Report(pub Vec<Row>);

impl Report {
    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            json!({
                "method": row.method,
                "trainable_parameters": row.trainable,
                "checkpoint_bytes": row.bytes,
                "right_merged": row.score.merged,
                "right_unmerged": row.score.unmerged,
                "examples": row.score.of,
                "milliseconds_per_step": row.step.as_secs_f64() * 1e3,
            })
        };
        self.0.iter().map(row).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "method   trained parameters  checkpoint bytes  accuracy  unmerged  ms/step")?;
        for Row { method, trainable, bytes, score, step } in &self.0 {
            let unmerged = 100. * score.unmerged as f64 / score.of as f64;
            write!(f, "{method:<8}{trainable:>19}{bytes:>18}{:>8.2} %", score.accuracy())?;
            writeln!(f, "{unmerged:>8.2} %{:>9.1}", step.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}
