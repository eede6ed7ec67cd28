//! Byte-level BPE: the bytes of a text, written as printable characters, are merged within the pieces
//! into which regular expressions split it.

use super::parts::Parts;
use super::vocabulary::Vocabulary;
use crate::gguf::metadata::{required, Metadata};
use crate::{Error, Result};
use candle_core::quantized::gguf_file;
use serde_json::{json, Value};

const MERGES: &str = "tokenizer.ggml.merges";
const PRE: &str = "tokenizer.ggml.pre";
const PREFIX: &str = "tokenizer.ggml.add_space_prefix";

/// Words with the character before them, up to three digits, punctuation, newlines, spaces.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Llama 3's with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral's: words end before a capital, and punctuation takes slashes.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GPT-2's.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How a text is split, by the name in the file.
struct Splitting {
    normalizer: Value,
    /// Each splits the pieces of the one before.
    patterns: &'static [&'static str],
    /// Whether a piece that is a token as a whole is never merged.
    ignores_merges: bool,
    adds_bos: bool,
}

/// The names whose tokenizers are known. `ignores_merges` and `adds_bos` are llama.cpp's.
fn splitting(name: &str) -> Result<Splitting> {
    let plain = |patterns| Splitting {
        normalizer: Value::Null,
        patterns,
        ignores_merges: false,
        adds_bos: false,
    };
    let whole = |patterns| Splitting { ignores_merges: true, adds_bos: true, ..plain(patterns) };
    Ok(match name {
        "gpt-2" => plain(&[GPT2]),
        // llama.cpp's own choice, which is no model's
        "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
        "smollm" => plain(&[r"\p{N}", GPT2]),
        "llama-bpe" | "llama3" | "llama-v3" => whole(&[LLAMA3]),
        "smaug-bpe" | "dbrx" => plain(&[LLAMA3]),
        "qwen2" => Splitting { normalizer: json!({ "type": "NFC" }), ..plain(&[QWEN2]) },
        "tekken" => whole(&[TEKKEN]),
        other => {
            return Err(Error::unsupported(
                format!("{PRE} = {other:?}"),
                "how its tokenizer splits text is not known here",
            ))
        }
    })
}

pub(super) fn parts(metadata: Metadata, vocabulary: &Vocabulary) -> Result<Parts> {
    let splitting = splitting(required(PRE, metadata.string(PRE)?)?)?;
    if metadata.bool(PREFIX)? == Some(true) {
        return Err(Error::unsupported(PREFIX, "no known byte-level tokenizer adds a space"));
    }
    let split = |pattern: &&str| {
        json!({
            "type": "Split",
            "pattern": { "Regex": pattern },
            "behavior": "Isolated",
            "invert": false,
        })
    };
    let byte_level = json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": false,
    });
    let steps: Vec<_> = splitting.patterns.iter().map(split).chain([byte_level]).collect();
    Ok(Parts {
        normalizer: splitting.normalizer,
        pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
        decoder: json!({
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": true,
            "use_regex": true,
        }),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": splitting.ignores_merges,
            "vocab": vocabulary.json(),
            "merges": merges(metadata, vocabulary)?,
        }),
        adds_bos: splitting.adds_bos,
    })
}

/// The pairs, first the one that is merged first.
fn merges<'a>(metadata: Metadata<'a>, vocabulary: &Vocabulary) -> Result<Vec<(&'a str, &'a str)>> {
    let merges = metadata.array(MERGES, "strings", |merge| match merge {
        gguf_file::Value::String(merge) => Some(merge.as_str()),
        _ => None,
    })?;
    let read = |merge: &'a str| {
        let wrong = |reason: String| Error::Invalid(format!("{MERGES} has {merge:?}: {reason}"));
        let (a, b) = merge.split_once(' ').ok_or_else(|| wrong("it is not a pair".into()))?;
        match [a, b, &[a, b].concat()].into_iter().find(|t| !vocabulary.ids.contains_key(t)) {
            None => Ok((a, b)),
            Some(token) => Err(wrong(format!("{token:?} is not a token"))),
        }
    };
    required(MERGES, merges)?.into_iter().map(read).collect()
}
