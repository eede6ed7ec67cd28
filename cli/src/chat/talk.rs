//! The same prompt to the base and to the adapted model.

use super::adapted::adapted;
use super::generate::generate;
use super::{Sampler, Say};
use crate::model::{Base, Llama};
use crate::train::{Document, Kind};
use crate::Result;
use serde_json::json;
use std::path::Path;

/// Each draws by a copy of `sampler`. The adapter is that in `folder`, as it lies on disk.
pub fn talk(
    say: &Say,
    sampler: &Sampler,
    base: &Base,
    prompt: &Prompt,
    folder: &Path,
) -> Result<()> {
    let ids = base.tokens.encode(&prompt.text, !prompt.templated)?;
    println!("\nprompt   {}", prompt.shown.trim());
    let reply = |model: &Llama| generate(model, base, &ids, say.tokens, &mut sampler.clone());
    // One model after the other: each has all the weights.
    println!("base     {}", reply(&base.model(base.var_builder()?)?)?.trim());
    println!("adapted  {}", reply(&adapted(base, folder, say.unmerged)?)?.trim());
    Ok(())
}

pub struct Prompt {
    shown: String,
    text: String,
    /// Whether the text has its special tokens.
    templated: bool,
}

impl Prompt {
    /// A message, or with `raw`, or for a model without a chat template, a text to continue.
    pub fn new(said: &str, base: &Base, raw: bool) -> Result<Self> {
        let template = base.template.as_ref().filter(|_| !raw);
        let message = [json!({"role": "user", "content": said})];
        let text = template.map(|template| template.render(&message, true)).transpose()?;
        let (templated, shown) = (text.is_some(), said.to_owned());
        Ok(Self { text: text.unwrap_or(shown.clone()), shown, templated })
    }

    /// What the replies of the training data follow.
    pub fn of(document: &Document) -> Self {
        let text = document.prompt();
        Self { shown: text.clone(), text, templated: document.kind == Kind::Chat }
    }
}
