//! The table at the end, and the same as JSON.

use crate::slots::Slots;
use serde_json::{json, Value};
use std::fmt;

/// A model's figures on the validation text.
pub struct Figures {
    pub loss: f64,
    pub tokens_per_second: f64,
}

/// One description in words.
pub struct Sentences {
    pub description: String,
    pub base: String,
    pub adapted: String,
    pub reference: String,
}

pub struct Report {
    pub trainable: usize,
    pub total: usize,
    pub adapter_bytes: u64,
    pub base_bytes: u64,
    pub models: [&'static str; 3],
    pub figures: [Figures; 3],
    /// The largest between merged and unmerged logits.
    pub difference: f32,
    pub slots: Slots,
    pub sentences: Vec<Sentences>,
}

impl Report {
    pub fn json(&self) -> Value {
        let figures = self.models.iter().zip(&self.figures).map(|(model, f)| {
            json!({
                "model": model,
                "validation_loss": f.loss,
                "perplexity": f.loss.exp(),
                "tokens_per_second": f.tokens_per_second,
            })
        });
        let sentences = self.sentences.iter().map(|s| {
            json!({
                "description": s.description,
                "base": s.base,
                "adapted": s.adapted,
                "reference": s.reference,
            })
        });
        let Slots { before, after, of, descriptions, counted } = self.slots;
        json!({
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "adapter_bytes": self.adapter_bytes,
            "base_bytes": self.base_bytes,
            "models": figures.collect::<Vec<_>>(),
            "largest_logit_difference": self.difference,
            "slot_accuracy": {
                "base": before as f64 / of as f64,
                "adapted": after as f64 / of as f64,
                "slots": of,
                "descriptions": descriptions,
                "counted_where": counted,
            },
            "sentences": sentences.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let share = 100. * self.trainable as f64 / self.total as f64;
        writeln!(
            f,
            "parameters           {} of {} trained ({share:.2} %)",
            self.trainable, self.total
        )?;
        writeln!(f, "adapter.safetensors  {} bytes", self.adapter_bytes)?;
        writeln!(f, "base                 {} bytes\n", self.base_bytes)?;
        writeln!(f, "validation      loss   perplexity   tokens/s")?;
        for (model, m) in self.models.iter().zip(&self.figures) {
            let (ppl, speed) = (m.loss.exp(), m.tokens_per_second);
            writeln!(f, "  {model:<10} {:>7.4} {ppl:>12.3} {speed:>10.0}", m.loss)?;
        }
        writeln!(f, "\nmerged and unmerged logits differ by {:.1e} at most", self.difference)?;
        writeln!(f, "the adapter, loaded into a new model, gives the same loss to the last bit")?;
        let Slots { before, after, of, descriptions, counted } = self.slots;
        writeln!(f, "\nslot accuracy, of {of} slots of {descriptions} descriptions")?;
        for (when, said) in [("before", before), ("after", after)] {
            writeln!(f, "  {when:<10} {:>5.1} %", 100. * said as f64 / of as f64)?;
        }
        writeln!(f, "a slot counts where {counted}")?;
        for s in &self.sentences {
            writeln!(f, "\n{}", s.description)?;
            writeln!(f, "  before     {}", s.base)?;
            writeln!(f, "  after      {}", s.adapted)?;
            writeln!(f, "  reference  {}", s.reference)?;
        }
        Ok(())
    }
}
