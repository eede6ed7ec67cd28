//! Byte-level BPE, as GPT-2's: of a Hugging Face folder, or trained with the small base.
//!
//! Few merges on little text make a token of most words and leave none unknown; bytes alone would
//! make lines four times as long, words alone would have no token for a new domain's.

use crate::data::Line;
use crate::Result;
use std::path::Path;
use tokenizers::decoders::byte_level::ByteLevel as Decoder;
use tokenizers::models::bpe::{BpeTrainerBuilder, BPE};
use tokenizers::models::TrainerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::AddedToken;

/// GPT-2's only special token: it ends descriptions and sentences.
const END: &str = "<|endoftext|>";

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    end: u32,
}

impl Tokenizer {
    pub fn read(path: &Path) -> Result<Self> {
        let read = tokenizers::Tokenizer::from_file(path).and_then(Self::new);
        read.map_err(|e| format!("{}: {e}", path.display()).into())
    }

    /// A tokenizer of at most `size` tokens for the text in `lines`.
    pub fn train(lines: &[Line], size: usize) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
        inner.with_decoder(Some(Decoder::default()));
        let trainer = BpeTrainerBuilder::new()
            .vocab_size(size)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let text = lines.iter().map(|line| format!("{} {}", line.description, line.sentence));
        inner.train(&mut TrainerWrapper::from(trainer), text)?;
        Self::new(inner)
    }

    fn new(inner: tokenizers::Tokenizer) -> Result<Self> {
        let end = inner.token_to_id(END).ok_or(format!("no token {END}"))?;
        Ok(Self { inner, end })
    }

    pub fn save(&self, path: &Path) -> Result<()> {
        self.inner.save(path, true)
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn end(&self) -> u32 {
        self.end
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.inner.encode(text, false)?.get_ids().to_vec())
    }

    /// What a sentence is to follow: the description and the end token.
    pub fn prompt(&self, description: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(description)?;
        ids.push(self.end);
        Ok(ids)
    }

    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(self.inner.decode(ids, true)?.trim().to_owned())
    }
}
