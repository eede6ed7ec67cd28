//! The tokens of a file and what they are.

use crate::gguf::metadata::{integer, required, Metadata};
use crate::{Error, Result};
use candle_core::quantized::gguf_file;
use serde_json::{json, Value};
use std::collections::HashMap;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Type {
    /// A piece of text. Unused tokens are too, as in Hugging Face's tokenizers.
    Normal,
    /// The token of text that has no other.
    Unknown,
    /// A mark such as BOS, which decoding may skip.
    Control,
    /// Text that is never split.
    UserDefined,
    /// A byte, written `<0x0A>`.
    Byte,
}

pub(super) struct Vocabulary<'a> {
    /// The tokens by their id.
    pub tokens: Vec<&'a str>,
    pub types: Vec<Type>,
    /// The ids by their token.
    pub ids: HashMap<&'a str, usize>,
    pub bos: Option<usize>,
    pub eos: Option<usize>,
    pub unknown: Option<usize>,
    /// Whether special tokens take the whitespace after them.
    strips_right: bool,
}

impl<'a> Vocabulary<'a> {
    pub fn read(metadata: Metadata<'a>, sentencepiece: bool) -> Result<Self> {
        let tokens = metadata.array(TOKENS, "strings", |token| match token {
            gguf_file::Value::String(token) => Some(token.as_str()),
            _ => None,
        })?;
        let tokens = required(TOKENS, tokens)?;
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(*token, id) {
                return Err(Error::Invalid(format!(
                    "{TOKENS} has {token:?} twice, as {first} and {id}"
                )));
            }
        }
        let types = types(metadata, tokens.len())?;
        let special = |name: &str, default: Option<usize>| -> Result<Option<usize>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            match metadata.integer(&key)?.or(default.filter(|_| sentencepiece)) {
                Some(id) if id >= tokens.len() => Err(Error::Invalid(format!(
                    "{key} is {id}, but the vocabulary has {} tokens",
                    tokens.len()
                ))),
                id => Ok(id),
            }
        };
        // Llama's ids, which are llama.cpp's own defaults.
        let (bos, eos) = (special("bos", Some(1))?, special("eos", Some(2))?);
        let unknown = special("unknown", Some(0))?;
        // No key tells that Phi-3's special tokens do this; llama.cpp knows it too.
        let strips_right =
            sentencepiece && metadata.string("general.architecture")? == Some("phi3");
        Ok(Self { tokens, types, ids, bos, eos, unknown, strips_right })
    }

    /// The tokens that are found in a text before it is split. BOS and EOS are special in every tokenizer,
    /// whatever type they have.
    pub fn added_tokens(&self) -> Vec<Value> {
        let plain = ["<unk>", "<s>", "<|endoftext|>"];
        let added = |(id, (token, kind)): (usize, (&&str, &Type))| {
            let special = matches!(kind, Type::Control | Type::Unknown)
                || [self.bos, self.eos].contains(&Some(id));
            (special || *kind == Type::UserDefined).then(|| {
                json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": self.strips_right && !plain.contains(token),
                    "normalized": false,
                    "special": special,
                })
            })
        };
        self.tokens.iter().zip(&self.types).enumerate().filter_map(added).collect()
    }

    /// The vocabulary of the BPE model, with the added tokens.
    pub fn json(&self) -> Value {
        self.ids.iter().map(|(token, id)| ((*token).to_owned(), json!(id))).collect()
    }
}

/// The types of `tokens` tokens. Without the key all are normal.
fn types(metadata: Metadata, tokens: usize) -> Result<Vec<Type>> {
    let read = |value: &gguf_file::Value| match integer(value)? {
        0 | 1 | 5 => Some(Type::Normal),
        2 => Some(Type::Unknown),
        3 => Some(Type::Control),
        4 => Some(Type::UserDefined),
        6 => Some(Type::Byte),
        _ => None,
    };
    let types = metadata.array(TYPES, "token types from 0 to 6", read)?;
    let types = types.unwrap_or_else(|| vec![Type::Normal; tokens]);
    if types.len() != tokens {
        return Err(Error::Invalid(format!(
            "{TYPES} has {} types for {tokens} tokens",
            types.len()
        )));
    }
    Ok(types)
}
