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

    /// How many tokens are predicted.
    pub fn predicted(&self) -> usize {
        self.learned.iter().skip(1).filter(|learned| **learned).count()
    }
}

/// Examples of at most `length` tokens to read, and how many documents were cut off to that. Texts are packed: one
/// follows the other, with an end between them. A document that is a prompt alone after the cut is an error.
pub fn examples(
    documents: &[Document],
    tokens: &Tokens,
    length: usize,
) -> Result<(Vec<Example>, usize)> {
    let (mut examples, mut packed, mut cut) = (vec![], vec![], 0);
    for document in documents {
        let mut example = encode(document, tokens)?;
        if document.kind == Kind::Text {
            packed.extend(example.ids);
            continue;
        }
        let whole = example.inputs();
        if whole > length {
            cut += 1;
            example.ids.truncate(length + 1);
            example.learned.truncate(length + 1);
        }
        if example.predicted() == 0 {
            let Document { at, .. } = document;
            let reason = "no token to learn among the first";
            return Err(format!("{at}: {reason} {length} of {whole}: see --length").into());
        }
        examples.push(example);
    }
    // The last token of one piece is the first of the next, so that each is predicted once.
    for start in (0..packed.len().saturating_sub(1)).step_by(length) {
        let ids = packed[start..packed.len().min(start + length + 1)].to_vec();
        examples.push(Example { learned: vec![true; ids.len()], ids });
    }
    match examples.is_empty() {
        true => Err("no text has two tokens: there is nothing to predict".into()),
        false => Ok((examples, cut)),
    }
}

/// The text as one, as it is when the model reads it; a token is learned if it ends in a learned piece.
fn encode(document: &Document, tokens: &Tokens) -> Result<Example> {
    let text: String = document.pieces.iter().map(|piece| &piece.text[..]).collect();
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
