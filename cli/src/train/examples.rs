//! Documents as tokens, cut or packed to a length.

use super::data::{Document, Kind};
use crate::model::Tokens;
use crate::Result;

pub struct Example {
    pub ids: Vec<u32>,
    /// Whether the model learns a token: after those before it, it should say this one.
    pub learned: Vec<bool>,
}

impl Example {
    /// How many tokens the model reads: all but the last.
    pub fn inputs(&self) -> usize {
        self.ids.len() - 1
    }

    /// Keeps so many tokens to read; whether there were more.
    pub fn cut(&mut self, length: usize) -> bool {
        let is_longer = self.inputs() > length;
        self.ids.truncate(length + 1);
        self.learned.truncate(length + 1);
        is_longer
    }

    /// How many tokens are predicted.
    pub fn predicted(&self) -> usize {
        self.learned.iter().skip(1).filter(|learned| **learned).count()
    }
}

/// The examples of a file, and what became of its documents.
pub struct Examples {
    pub all: Vec<Example>,
    /// Documents that were cut off.
    pub cut: usize,
    /// Where the documents stand that have no token to learn, so cut.
    pub dropped: Vec<String>,
}

/// Examples of at most `length` tokens to read. Texts are one text, with an end after each, in parts of that length. A
/// document that is a prompt alone after the cut is dropped.
pub fn examples(documents: &[Document], tokens: &Tokens, length: usize) -> Result<Examples> {
    let (mut all, mut texts, mut cut, mut dropped) = (vec![], vec![], 0, vec![]);
    for document in documents {
        let mut example = encode(document, tokens)?;
        if document.kind == Kind::Text {
            texts.extend(example.ids.into_iter().zip(example.learned));
            continue;
        }
        let is_cut = example.cut(length);
        if example.predicted() == 0 {
            dropped.push(document.at.clone());
            continue;
        }
        cut += usize::from(is_cut);
        all.push(example);
    }
    // The last token of one piece is the first of the next, so that each is predicted once.
    for start in (0..texts.len().saturating_sub(1)).step_by(length) {
        let part = &texts[start..texts.len().min(start + length + 1)];
        let (ids, learned) = part.iter().copied().unzip();
        let example = Example { ids, learned };
        all.extend((example.predicted() > 0).then_some(example));
    }
    match (all.is_empty(), dropped.first()) {
        (false, _) => Ok(Examples { all, cut, dropped }),
        (true, Some(at)) => {
            Err(format!("{at}: no token to learn among the first {length}: see --length").into())
        }
        (true, None) => Err("no text has two tokens: there is nothing to predict".into()),
    }
}

/// The text as one, as it is when the model reads it; a token is learned if it ends in a learned piece.
pub fn encode(document: &Document, tokens: &Tokens) -> Result<Example> {
    let text = document.text();
    // A template writes the special tokens itself.
    let special = document.kind != Kind::Chat;
    let (mut ids, ends) = tokens.encode_with_ends(&text, special)?;
    let (mut pieces, mut begin) = (vec![], 0);
    for piece in &document.pieces {
        pieces.push((begin..begin + piece.text.len(), piece.learned));
        begin += piece.text.len();
    }
    let learns = |end: usize| {
        pieces.iter().any(|(range, learned)| *learned && range.start < end && end <= range.end)
    };
    let mut learned: Vec<_> = ends.into_iter().map(learns).collect();
    if document.kind != Kind::Chat {
        ids.push(tokens.end());
        learned.push(true);
    }
    Ok(Example { ids, learned })
}
