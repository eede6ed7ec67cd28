//! A text that the model answers to.

use crate::model::Base;
use crate::train::{Document, Kind};
use crate::Result;
use serde_json::{json, Value};

pub struct Prompt {
    pub shown: String,
    text: String,
    /// Whether the text has its special tokens.
    templated: bool,
}

impl Prompt {
    /// A message, or with `raw`, or for a model without a chat template, a text to continue.
    pub fn new(said: &str, system: Option<&str>, base: &Base, raw: bool) -> Result<Self> {
        let chats = base.template.is_some() && !raw;
        if system.is_some() && !chats {
            return Err("--system: the model has no chat template".into());
        }
        match chats {
            true => Self::of_messages(&[&first(system)[..], &[user(said)]].concat(), base, said),
            false => Ok(Self { shown: said.to_owned(), text: said.to_owned(), templated: false }),
        }
    }

    /// The conversation so far, of which `said` is shown.
    pub fn of_messages(messages: &[Value], base: &Base, said: &str) -> Result<Self> {
        let template = base.template.as_ref().ok_or("the model has no chat template")?;
        Ok(Self { shown: said.to_owned(), text: template.render(messages, true)?, templated: true })
    }

    /// What the replies of the training data follow.
    pub fn of(document: &Document) -> Self {
        let text = document.prompt();
        let shown = document.said.clone().unwrap_or(text.clone());
        Self { shown, text, templated: document.kind == Kind::Chat }
    }

    pub fn ids(&self, base: &Base) -> Result<Vec<u32>> {
        base.tokens.encode(&self.text, !self.templated)
    }
}

/// What a conversation begins with.
pub fn first(system: Option<&str>) -> Vec<Value> {
    system.into_iter().map(|system| json!({"role": "system", "content": system})).collect()
}

pub fn user(said: &str) -> Value {
    json!({"role": "user", "content": said})
}
