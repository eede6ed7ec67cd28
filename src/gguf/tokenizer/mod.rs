//! A model's `tokenizer.json`, as Hugging Face writes it, from a file's metadata.

mod byte_level;
mod parts;
mod sentencepiece;
mod vocabulary;

use super::metadata::{required, Metadata};
use crate::{Error, Result};
use candle_core::quantized::gguf_file;
use parts::Parts;
use serde_json::{json, Value};
use std::collections::HashMap;
use vocabulary::Vocabulary;

/// The content of the file, which `tokenizers::Tokenizer::from_bytes` reads.
pub(super) fn tokenizer(metadata: &HashMap<String, gguf_file::Value>) -> Result<Value> {
    let metadata = Metadata(metadata);
    let key = "tokenizer.ggml.model";
    let model = required(key, metadata.string(key)?)?;
    let read: fn(Metadata, &Vocabulary) -> Result<Parts> = match model {
        "gpt2" => byte_level::parts,
        "llama" => sentencepiece::parts,
        other => {
            return Err(Error::unsupported(
                format!("the GGUF tokenizer {other:?}"),
                "the known ones are gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
            ))
        }
    };
    let vocabulary = Vocabulary::read(metadata, model == "llama")?;
    let parts = read(metadata, &vocabulary)?;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(metadata, &vocabulary, parts.adds_bos)?,
        "decoder": parts.decoder,
        "model": parts.model,
    }))
}

/// Adds BOS and EOS around every text, if the tokenizer does so.
fn post_processor(metadata: Metadata, vocabulary: &Vocabulary, adds_bos: bool) -> Result<Value> {
    let adds = |name: &str, id: Option<usize>, default: bool| {
        let adds = metadata.bool(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default);
        let id = || required(&format!("tokenizer.ggml.{name}_token_id"), id);
        if adds {
            Ok(Some((vocabulary.tokens[id()?], id()?)))
        } else {
            Ok::<_, Error>(None)
        }
    };
    let bos = adds("bos", vocabulary.bos, adds_bos)?;
    let eos = adds("eos", vocabulary.eos, false)?;
    if bos.is_none() && eos.is_none() {
        return Ok(Value::Null);
    }
    let special = |token: &(&str, usize), type_id| json!({ "SpecialToken": { "id": token.0, "type_id": type_id } });
    let sequence = |name: &str, type_id: usize| -> Vec<Value> {
        let text = json!({ "Sequence": { "id": name, "type_id": type_id } });
        let bos = bos.iter().map(|bos| special(bos, type_id));
        bos.chain([text]).chain(eos.iter().map(|eos| special(eos, type_id))).collect()
    };
    let tokens = bos.iter().chain(&eos).map(|(token, id)| {
        ((*token).to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }))
    });
    let pair = [sequence("A", 0), sequence("B", 1)].concat();
    Ok(json!({
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": pair,
        "special_tokens": tokens.collect::<serde_json::Map<_, _>>(),
    }))
}
