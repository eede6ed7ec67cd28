//! Descriptions put into words before and after adapting: slot accuracy, and some sentences to read.

use crate::args::Args;
use crate::base::Base;
use crate::data::Line;
use crate::generate::generate;
use crate::gpt2::Gpt2;
use crate::report::Sentences;
use crate::slots::{said, Slots};
use crate::text::thinned;
use crate::Result;
use candle_core::Device;

/// How many descriptions are put into words, at most.
const DESCRIBED: usize = 100;
/// How many of them are shown.
const SHOWN: usize = 3;

pub fn describe(
    args: &Args,
    base: &Base,
    plain: &Gpt2,
    adapted: &Gpt2,
    valid: &[Line],
    device: &Device,
) -> Result<(Slots, Vec<Sentences>)> {
    let lines = thinned(valid, DESCRIBED);
    let descriptions: Vec<_> = lines.iter().map(|line| &line.description[..]).collect();
    let before = generate(plain, base, &descriptions, device)?;
    let after = generate(adapted, base, &descriptions, device)?;
    let count = |sentences: &[String]| lines.iter().zip(sentences).map(|(l, s)| said(l, s)).sum();
    let slots = Slots {
        before: count(&before),
        after: count(&after),
        of: lines.iter().map(|line| line.slots.len()).sum(),
        descriptions: lines.len(),
        counted: match args.valid {
            Some(_) => "its value stands in the sentence",
            None => "the grammar's words for its value stand in the sentence",
        },
    };
    let sentences = lines.iter().zip(before).zip(after).map(|((line, base), adapted)| Sentences {
        description: line.description.clone(),
        base,
        adapted,
        reference: line.sentence.clone(),
    });
    let sentences = sentences.step_by(lines.len().div_ceil(SHOWN)).collect();
    Ok((slots, sentences))
}
