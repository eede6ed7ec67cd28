//! SentencePiece's BPE: the characters of the whole text, with `▁` for spaces, are merged by the scores
//! of the results, and a character that is no token becomes its bytes.

use super::parts::Parts;
use super::vocabulary::{Type, Vocabulary};
use crate::gguf::metadata::{required, Metadata};
use crate::{Error, Result};
use candle_core::quantized::gguf_file;
use serde_json::{json, Value};
use std::cmp::{Ordering::Equal, Reverse};
use std::collections::BTreeSet;

const SCORES: &str = "tokenizer.ggml.scores";

/// SentencePiece's space.
const SPACE: &str = "▁";

pub(super) fn parts(metadata: Metadata, vocabulary: &Vocabulary) -> Result<Parts> {
    // llama.cpp's own default
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok(Parts {
        normalizer: normalizer(prefix),
        pre_tokenizer: Value::Null,
        decoder: decoder(prefix),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": vocabulary.unknown.map(|id| vocabulary.tokens[id]),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.json(),
            "merges": merges(metadata, vocabulary)?,
        }),
        // llama.cpp's own default
        adds_bos: true,
    })
}

fn normalizer(prefix: bool) -> Value {
    let prepend = json!({ "type": "Prepend", "prepend": SPACE });
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let steps: Vec<_> = prefix.then_some(prepend).into_iter().chain([replace]).collect();
    json!({ "type": "Sequence", "normalizers": steps })
}

fn decoder(prefix: bool) -> Value {
    let replace = json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " });
    let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
    let bytes = [replace, json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    let steps: Vec<_> = bytes.into_iter().chain(prefix.then_some(strip)).collect();
    json!({ "type": "Sequence", "decoders": steps })
}

/// The pairs of tokens whose concatenation is a token, first the one that is merged first: by the score
/// of the result, then the longer left one, as Hugging Face's converter orders them.
fn merges<'a>(metadata: Metadata, vocabulary: &Vocabulary<'a>) -> Result<Vec<(&'a str, &'a str)>> {
    let scores = metadata.array(SCORES, "numbers", |score| match score {
        gguf_file::Value::F32(score) => Some(*score).filter(|score| !score.is_nan()),
        _ => None,
    })?;
    let scores = required(SCORES, scores)?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(Error::Invalid(format!(
            "{SCORES} has {} scores for {} tokens",
            scores.len(),
            vocabulary.tokens.len()
        )));
    }
    let mut merges: Vec<(f32, &str, &str)> = vec![];
    // A long token would be looked up by each of its many parts.
    let lengths: BTreeSet<usize> = vocabulary.tokens.iter().map(|token| token.len()).collect();
    let is_length = |length| lengths.contains(&length);
    for (id, (token, score)) in vocabulary.tokens.iter().zip(&scores).enumerate() {
        if is_text(vocabulary, id) {
            let ends = lengths.range(1..token.len()).filter(|end| is_length(token.len() - *end));
            let parts = ends.filter_map(|end| token.split_at_checked(*end));
            let pairs = parts.filter(|(a, b)| {
                [a, b]
                    .iter()
                    .all(|t| vocabulary.ids.get(**t).is_some_and(|id| is_text(vocabulary, *id)))
            });
            merges.extend(pairs.map(|(a, b)| (*score, a, b)));
        }
    }
    let length = |text: &str| Reverse(text.chars().count());
    merges.sort_by(|(x, a, b), (y, c, d)| {
        y.partial_cmp(x).unwrap_or(Equal).then((length(a), length(b)).cmp(&(length(c), length(d))))
    });
    Ok(merges.into_iter().map(|(_, a, b)| (a, b)).collect())
}

/// Whether merging may make the token: SentencePiece never makes its marks and bytes from text.
fn is_text(vocabulary: &Vocabulary, id: usize) -> bool {
    matches!(vocabulary.types[id], Type::Normal | Type::UserDefined)
}
