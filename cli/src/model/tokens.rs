//! The model's tokenizer, and the tokens that end a text.

use crate::Result;
use serde_json::Value;
use tokenizers::{
    DecodeStream, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, Tokenizer,
};

/// Text from tokens, one at a time.
pub type Stream<'a> = DecodeStream<
    'a,
    ModelWrapper,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

pub struct Tokens {
    inner: Tokenizer,
    /// The first is the one that training puts behind a text.
    ends: Vec<u32>,
    /// How many tokens the model takes.
    count: usize,
}

impl Tokens {
    /// `ends` are values of `eos_token` or `eos_token_id`: a text, an id or a list of ids. The first that is
    /// given comes first.
    pub fn new(json: &str, ends: &[&Value]) -> Result<Self> {
        let mut inner = json.parse::<Tokenizer>()?;
        inner.with_padding(None);
        inner.with_truncation(None)?;
        let mut found = vec![];
        for end in ends {
            match end {
                Value::Array(ids) => found.extend(ids.iter().filter_map(Value::as_u64)),
                Value::Number(id) => found.extend(id.as_u64()),
                other => {
                    found.extend(text(other).and_then(|t| inner.token_to_id(t)).map(u64::from))
                }
            }
        }
        match found.is_empty() {
            true => Err("no eos_token says which token ends a text".into()),
            false => {
                let ends = found.into_iter().map(|id| id as u32).collect();
                Ok(Self { inner, ends, count: usize::MAX })
            }
        }
    }

    /// Of a model that takes the first `count` tokens.
    pub fn below(self, count: usize) -> Self {
        Self { count, ..self }
    }

    /// With `special` the tokens that the tokenizer puts around a text, such as Llama's first.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.checked(self.inner.encode(text, special)?.get_ids())
    }

    /// The tokens, and where in the text each ends; a special one that is put before it, at 0.
    pub fn encode_with_ends(&self, text: &str, special: bool) -> Result<(Vec<u32>, Vec<usize>)> {
        let encoding = self.inner.encode(text, special)?;
        let ends = encoding.get_offsets().iter().map(|(_, end)| *end);
        Ok((self.checked(encoding.get_ids())?, ends.collect()))
    }

    fn checked(&self, ids: &[u32]) -> Result<Vec<u32>> {
        match ids.iter().find(|id| **id as usize >= self.count) {
            Some(id) => {
                let token = self.inner.id_to_token(*id).unwrap_or_default();
                let count = self.count;
                Err(format!("the model takes {count} tokens, and the text has {token:?}, {id}")
                    .into())
            }
            None => Ok(ids.to_vec()),
        }
    }

    /// The same text as [`decode`](Self::decode), piece by piece.
    pub fn stream(&self) -> Stream<'_> {
        self.inner.decode_stream(true)
    }

    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true)
    }

    /// The text of the token with this id, or nothing for none.
    pub fn text(&self, id: &Value) -> String {
        let id = id.as_u64().and_then(|id| self.inner.id_to_token(id as u32));
        id.unwrap_or_default()
    }

    /// The id of a token that the model takes.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token).filter(|id| (*id as usize) < self.count)
    }

    /// The token behind a text.
    pub fn end(&self) -> u32 {
        self.ends[0]
    }

    /// Whether a text ends with this token.
    pub fn ends(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }
}

/// A special token's text: tokenizer_config.json has it as such, or as the content of an object.
pub fn text(token: &Value) -> Option<&str> {
    token.as_str().or(token["content"].as_str())
}
