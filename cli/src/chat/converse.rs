//! Several turns with the adapted model: a line from the standard input is a message, or for a model without a
//! chat template a text to continue.

use super::adapted::adapted;
use super::generate::generate;
use super::{Sampler, Say};
use crate::model::Base;
use crate::Result;
use serde_json::json;
use std::io::{self, BufRead, Write};
use std::path::Path;

/// Until the input ends.
pub fn converse(say: &Say, sampler: &mut Sampler, base: &Base, folder: &Path) -> Result<()> {
    let model = adapted(base, folder, say.unmerged)?;
    let template = base.template.as_ref().filter(|_| !say.raw);
    let (mut messages, mut text) = (vec![], String::new());
    loop {
        print!("> ");
        io::stdout().flush()?;
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line)? == 0 {
            println!();
            return Ok(());
        }
        let said = line.trim();
        if said.is_empty() {
            continue;
        }
        match template {
            Some(template) => {
                messages.push(json!({"role": "user", "content": said}));
                text = template.render(&messages, true)?;
            }
            None => text.push_str(said),
        }
        let ids = base.tokens.encode(&text, template.is_none())?;
        let reply = generate(&model, base, &ids, say.tokens, sampler)?;
        println!("{}", reply.trim());
        match template {
            Some(_) => messages.push(json!({"role": "assistant", "content": reply})),
            None => text.push_str(&reply),
        }
    }
}
