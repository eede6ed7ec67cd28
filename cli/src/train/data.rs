//! Training data: a line is a text, a prompt with its completion, or a conversation.

use super::lines::lines;
use crate::model::Template;
use crate::Result;
use serde_json::Value;
use std::path::Path;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Completion,
    Chat,
}

/// A text in pieces, of which the model learns some and is given the others.
pub struct Document {
    /// `file:line`, for messages.
    pub at: String,
    pub kind: Kind,
    pub pieces: Vec<Piece>,
}

pub struct Piece {
    pub text: String,
    pub learned: bool,
}

/// The documents of a file: each line of a .txt, or JSON Lines with `text`, with `prompt` and `completion`, or
/// with `messages`, which need the model's chat template. An error names the file and the line.
pub fn read(path: &Path, template: Option<&Template>) -> Result<Vec<Document>> {
    let plain = path.extension().is_some_and(|extension| extension == "txt");
    let mut documents = vec![];
    for (at, line) in lines(path)? {
        let read = match plain {
            true => Ok(vec![Document::text(&at, line.clone())]),
            false => from_json(&at, &line, template),
        };
        documents.extend(read.map_err(|e| format!("{at}: {e}: {}", shortened(&line)))?);
    }
    Ok(documents)
}

impl Document {
    fn text(at: &str, text: String) -> Self {
        Self::new(at, Kind::Text, vec![Piece { text, learned: true }])
    }

    fn new(at: &str, kind: Kind, pieces: Vec<Piece>) -> Self {
        Self { at: at.to_owned(), kind, pieces }
    }

    /// What a reply follows: what stands before the first learned piece, or the beginning of a text.
    pub fn prompt(&self) -> String {
        let given = self.pieces.iter().take_while(|piece| !piece.learned);
        match self.kind {
            Kind::Text => {
                let words: Vec<_> = self.pieces[0].text.split_inclusive(' ').collect();
                words[..words.len().div_ceil(3)].concat().trim_end().to_owned()
            }
            Kind::Completion | Kind::Chat => given.map(|piece| &piece.text[..]).collect(),
        }
    }
}

fn from_json(at: &str, line: &str, template: Option<&Template>) -> Result<Vec<Document>> {
    let json: Value = serde_json::from_str(line)?;
    let text = |key: &str| json[key].as_str().map(str::to_owned);
    if let Some(text) = text("text") {
        return Ok(vec![Document::text(at, text)]);
    }
    if let (Some(prompt), Some(completion)) = (text("prompt"), text("completion")) {
        let given = Piece { text: prompt, learned: false };
        let learned = Piece { text: completion, learned: true };
        return Ok(vec![Document::new(at, Kind::Completion, vec![given, learned])]);
    }
    let messages = json["messages"].as_array();
    let messages = messages
        .ok_or("no texts \"text\", or \"prompt\" and \"completion\", and no list \"messages\"")?;
    let template = template.ok_or("the model has no chat template for \"messages\"")?;
    conversation(at, messages, template)
}

/// What the assistant says is learned, each time after what the template puts before it.
fn conversation(at: &str, messages: &[Value], template: &Template) -> Result<Vec<Document>> {
    if let Some(bad) = messages.iter().find(|m| !m["role"].is_string() || !m["content"].is_string())
    {
        return Err(format!("a message without the texts \"role\" and \"content\": {bad}").into());
    }
    let (mut documents, mut pieces, mut said): (Vec<Document>, Vec<Piece>, _) =
        (vec![], vec![], String::new());
    for i in (0..messages.len()).filter(|&i| messages[i]["role"] == "assistant") {
        let before = template.render(&messages[..i], true)?;
        let after = template.render(&messages[..=i], false)?;
        let reply = after.strip_prefix(&before).ok_or_else(|| {
            format!(
                "the chat template changes what is before the reply: {before:?}, then {after:?}"
            )
        })?;
        // Some templates shorten earlier replies: then the later ones are a document of their own.
        let given = match before.strip_prefix(&said) {
            Some(given) => given,
            None => {
                documents.push(Document::new(at, Kind::Chat, std::mem::take(&mut pieces)));
                &before
            }
        };
        pieces.push(Piece { text: given.to_owned(), learned: false });
        pieces.push(Piece { text: reply.to_owned(), learned: true });
        said = after;
    }
    documents.push(Document::new(at, Kind::Chat, pieces));
    match documents.iter().all(|document| document.pieces.is_empty()) {
        true => Err("no message of the role \"assistant\"".into()),
        false => Ok(documents),
    }
}

/// A line for a message.
fn shortened(line: &str) -> String {
    match line.char_indices().nth(200) {
        Some((end, _)) => format!("{}..", &line[..end]),
        None => line.to_owned(),
    }
}
