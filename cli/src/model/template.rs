//! The model's chat template: messages to the text that the model continues.

use crate::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{context, Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value;

/// A Jinja template, with what transformers gives it.
pub struct Template {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

impl Template {
    /// `bos` and `eos` are the texts of the tokens around a text.
    pub fn new(source: String, bos: String, eos: String) -> Result<Self> {
        let mut env = Environment::new();
        env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        env.set_unknown_method_callback(unknown_method_callback);
        env.add_function("raise_exception", |reason: String| -> std::result::Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason))
        });
        env.add_template_owned("chat", source).map_err(|e| format!("the chat template: {e}"))?;
        Ok(Self { env, bos, eos })
    }

    /// The conversation as one text; with `reply` also what stands before the assistant's next words.
    pub fn render(&self, messages: &[Value], reply: bool) -> Result<String> {
        let values = context! {
            messages => Serde(messages),
            add_generation_prompt => reply,
            bos_token => &self.bos,
            eos_token => &self.eos,
        };
        let rendered = self.env.get_template("chat").and_then(|chat| chat.render(values));
        rendered.map_err(|e| format!("the chat template: {e}").into())
    }
}
