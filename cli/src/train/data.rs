//! Training data: an entry is a text, a prompt with its completion, or a conversation.

use super::columns::Columns;
use super::entries::{entries, shortened, Entry};
use crate::model::Template;
use crate::Result;
use serde_json::{json, Value};
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
    /// What a person said before the first reply of a conversation.
    pub said: Option<String>,
}

pub struct Piece {
    pub text: String,
    pub learned: bool,
}

/// The documents of a file: of a .txt each line; of JSON Lines or a JSON array what [`from_json`] knows. Conversations
/// need the model's chat template. An error names the file, the line and what it is.
pub fn read(path: &Path, columns: &Columns, template: Option<&Template>) -> Result<Vec<Document>> {
    let mut documents = vec![];
    for (at, entry) in entries(path)? {
        match entry {
            Entry::Line(line) => documents.push(Document::plain(&at, line)),
            Entry::Json(json) => {
                let read = from_json(&at, &json, columns, template);
                let read = read.map_err(|e| format!("{at}: {e}: {}", shortened(&json.to_string())));
                documents.extend(read?);
            }
        }
    }
    Ok(documents)
}

impl Document {
    fn plain(at: &str, text: String) -> Self {
        Self::new(at, Kind::Text, vec![Piece { text, learned: true }])
    }

    pub fn completion(at: &str, prompt: String, completion: String) -> Self {
        let given = Piece { text: prompt, learned: false };
        let learned = Piece { text: completion, learned: true };
        Self::new(at, Kind::Completion, vec![given, learned])
    }

    fn new(at: &str, kind: Kind, pieces: Vec<Piece>) -> Self {
        Self { at: at.to_owned(), kind, pieces, said: None }
    }

    /// All of it, as the model reads it.
    pub fn text(&self) -> String {
        self.pieces.iter().map(|piece| &piece.text[..]).collect()
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

const EXPECTED: &str =
    "expected \"text\", \"prompt\" and \"completion\", \"messages\", \"conversations\", or \
                        \"instruction\" and \"output\"; --columns gives other names";
pub const NO_TEMPLATE: &str =
    "the model has no chat template for a conversation: give \"prompt\" and \"completion\", or \
                           another model";

/// A "text"; a "prompt" and a "completion", which are texts or lists of messages; "messages"; ShareGPT's "conversations";
/// or Alpaca's "instruction", "input" and "output", a conversation if the model has a chat template.
fn from_json(
    at: &str,
    json: &Value,
    columns: &Columns,
    template: Option<&Template>,
) -> Result<Vec<Document>> {
    if let Some(missing) = columns.missing(json) {
        return Err(format!("no column {missing:?}").into());
    }
    let text = |name: &str| columns.text(json, name);
    let list = |name: &str| columns.of(json, name).as_array();
    let chat = |messages: &[Value], given: usize| match template {
        Some(template) => conversation(at, messages, given, template),
        None => Err(NO_TEMPLATE.into()),
    };
    if let Some(text) = text("text").filter(|_| columns.names("text")) {
        return Ok(vec![Document::plain(at, text)]);
    }
    if let (Some(prompt), Some(completion)) = (text("prompt"), text("completion")) {
        return Ok(vec![Document::completion(at, prompt, completion)]);
    }
    if let (Some(prompt), Some(completion)) = (list("prompt"), list("completion")) {
        return chat(&[&prompt[..], &completion[..]].concat(), prompt.len());
    }
    if let Some(messages) = list("messages") {
        return chat(messages, 0);
    }
    if let Some(turns) = list("conversations") {
        let system = text("system").filter(|system| !system.is_empty());
        let system = system.map(|system| json!({"role": "system", "content": system}));
        let turns = turns.iter().map(from_sharegpt).collect::<Result<Vec<_>>>()?;
        return chat(&system.into_iter().chain(turns).collect::<Vec<_>>(), 0);
    }
    if let (Some(instruction), Some(output)) = (text("instruction"), text("output")) {
        let input = text("input").filter(|input| !input.is_empty());
        let prompt = [Some(instruction), input].into_iter().flatten().collect::<Vec<_>>();
        let prompt = prompt.join("\n\n");
        return match template {
            None => Ok(vec![Document::completion(at, prompt + "\n\n", output)]),
            Some(_) => {
                let system = text("system").filter(|system| !system.is_empty());
                let system = system.map(|system| json!({"role": "system", "content": system}));
                let user = json!({"role": "user", "content": prompt});
                let assistant = json!({"role": "assistant", "content": output});
                chat(&system.into_iter().chain([user, assistant]).collect::<Vec<_>>(), 0)
            }
        };
    }
    // Some files have the whole text beside its parts.
    if let Some(text) = text("text") {
        return Ok(vec![Document::plain(at, text)]);
    }
    match columns.of(json, "chosen") {
        Value::Null => Err(EXPECTED.into()),
        _ => Err("it has a chosen answer and a rejected one: --loss dpo learns from them".into()),
    }
}

/// A turn of ShareGPT as a message.
fn from_sharegpt(turn: &Value) -> Result<Value> {
    let (Some(from), Some(said)) = (turn["from"].as_str(), turn["value"].as_str()) else {
        // Some files have messages under this name.
        return match turn["role"].is_string() {
            true => Ok(turn.clone()),
            false => Err(format!("a turn without the texts \"from\" and \"value\": {turn}").into()),
        };
    };
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" | "chatgpt" | "bing" | "bard" => "assistant",
        "system" => "system",
        "tool" | "function_response" | "observation" => "tool",
        other => {
            return Err(format!("a turn from {other:?}: expected human, gpt, system or tool").into())
        }
    };
    Ok(json!({"role": role, "content": said}))
}

/// What the assistant says is learned, each time after what the template puts before it, but for the first `given` messages.
pub fn conversation(
    at: &str,
    messages: &[Value],
    given: usize,
    template: &Template,
) -> Result<Vec<Document>> {
    if let Some(bad) = messages.iter().find(|m| !m["role"].is_string() || !m["content"].is_string())
    {
        return Err(format!("a message without the texts \"role\" and \"content\": {bad}").into());
    }
    let (mut documents, mut pieces, mut said): (Vec<Document>, Vec<Piece>, _) =
        (vec![], vec![], String::new());
    for i in (given..messages.len()).filter(|&i| messages[i]["role"] == "assistant") {
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
    let reply = messages.iter().position(|message| message["role"] == "assistant").unwrap_or(0);
    let said = messages[..reply].last().and_then(|message| message["content"].as_str());
    if let Some(first) = documents.first_mut().filter(|_| given <= reply) {
        first.said = said.map(str::to_owned);
    }
    match documents.iter().all(|document| document.pieces.is_empty()) {
        true => Err("no message of the role \"assistant\"".into()),
        false => Ok(documents),
    }
}
