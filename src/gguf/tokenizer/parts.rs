//! The parts of a tokenizer that its kind decides.

use serde_json::Value;

/// What differs between the kinds of tokenizers.
pub(super) struct Parts {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
    pub model: Value,
    /// Whether a text starts with the BOS token if the file does not tell.
    pub adds_bos: bool,
}
