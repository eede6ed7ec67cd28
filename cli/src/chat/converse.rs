//! Several turns: a line from the standard input is a message, or for a model without a chat template a text to
//! continue. Lines that begin with `/` are commands.

use super::prompt::{first, user, Prompt};
use super::speaker::Speaker;
use super::{Sampler, Say};
use crate::report::Report;
use crate::Result;
use serde_json::{json, Value};
use std::io::{self, BufRead, IsTerminal};

const HELP: &str = "\
/adapter NAME  lets an adapter speak; \"none\" is the model alone
/adapters      lists them
/reset         forgets the conversation
/help          shows this
/exit          leaves, as Ctrl-D does
A message that begins with / is written with two: //";

enum Command<'a> {
    Say(&'a str),
    Adapter(Option<&'a str>),
    Adapters,
    Reset,
    Help,
    Exit,
    Unknown(&'a str),
}

impl<'a> Command<'a> {
    fn parse(line: &'a str) -> Self {
        let Some(command) = line.strip_prefix('/') else { return Self::Say(line) };
        match command.split_once(' ').map_or((command, ""), |(name, rest)| (name, rest.trim())) {
            ("adapter", "") | ("adapters", "") => Self::Adapters,
            ("adapter", "none") => Self::Adapter(None),
            ("adapter", name) => Self::Adapter(Some(name)),
            ("reset", "") => Self::Reset,
            ("help", "") | ("?", "") => Self::Help,
            ("exit" | "quit" | "bye", "") => Self::Exit,
            _ if command.starts_with('/') => Self::Say(command),
            _ => Self::Unknown(line),
        }
    }
}

/// Until the input ends.
pub fn converse(
    say: &Say,
    sampler: &mut Sampler,
    speaker: &mut Speaker,
    report: Report,
) -> Result<()> {
    let people = report.is_read() && io::stdin().is_terminal();
    let prompt = |text: &str| {
        if people {
            report.piece(text);
        }
    };
    if say.system.is_some() && speaker.base.template.is_none() {
        return Err("--system: the model has no chat template".into());
    }
    let mut conversation = Conversation::new(say, speaker, report);
    let (model, by) = (conversation.speaker.base.describe(), conversation.speaks());
    prompt(&format!("{model}; {by}\n/help shows the commands, /exit or Ctrl-D leaves\n"));
    loop {
        prompt("> ");
        let mut line = vec![];
        if io::stdin().lock().read_until(b'\n', &mut line)? == 0 {
            prompt("\n");
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line);
        match Command::parse(line.trim_end_matches(['\r', '\n'])) {
            Command::Exit => return Ok(()),
            Command::Say(said) if said.trim().is_empty() => {}
            Command::Say(said) => match conversation.answer(said, sampler) {
                // A person may try again.
                Err(error) if people => report.piece(&format!("{error}\n")),
                answered => answered?,
            },
            command => conversation.obey(&command),
        }
    }
}

struct Conversation<'a, 'b> {
    say: &'a Say,
    speaker: &'a mut Speaker<'b>,
    report: Report,
    /// The adapter that speaks.
    by: Option<String>,
    messages: Vec<Value>,
    /// The text, if the model does not chat.
    ids: Vec<u32>,
}

impl<'a, 'b> Conversation<'a, 'b> {
    fn new(say: &'a Say, speaker: &'a mut Speaker<'b>, report: Report) -> Self {
        let (by, messages) = (speaker.names.first().cloned(), first(say.system.as_deref()));
        Self { say, speaker, report, by, messages, ids: vec![] }
    }

    fn speaks(&self) -> String {
        match &self.by {
            Some(name) => format!("{name} speaks"),
            None => "the model speaks without an adapter".to_owned(),
        }
    }

    /// Does what a command asks, but for the two that the conversation is made of.
    fn obey(&mut self, command: &Command) {
        let names = self.speaker.names.join(", ");
        let (line, event, values) = match command {
            Command::Say(_) | Command::Exit => return,
            Command::Help => (HELP.to_owned(), "help", json!({ "text": HELP })),
            Command::Adapters => {
                let values = json!({ "names": self.speaker.names, "speaks": self.by });
                (format!("adapters: {names}; {}", self.speaks()), "adapters", values)
            }
            Command::Adapter(Some(name))
                if !self.speaker.names.iter().any(|known| known == name) =>
            {
                let line = format!("no adapter {name:?}, there are: {names}");
                (line, "unknown", json!({ "adapter": name }))
            }
            Command::Adapter(name) => {
                self.by = name.map(str::to_owned);
                (self.speaks(), "adapter", json!({ "speaks": self.by }))
            }
            Command::Reset => {
                (self.messages, self.ids) = (first(self.say.system.as_deref()), vec![]);
                ("the conversation is forgotten".to_owned(), "reset", json!({}))
            }
            Command::Unknown(command) => {
                let line = format!("{command}: no such command, /help shows them");
                (line, "unknown", json!({ "command": command }))
            }
        };
        self.report.tell(line, event, values);
    }

    /// Shows the reply as it is said.
    fn answer(&mut self, said: &str, sampler: &mut Sampler) -> Result<()> {
        let before = self.messages.len();
        let answered = self.answered(said, sampler);
        if answered.is_err() {
            self.messages.truncate(before);
        }
        answered
    }

    fn answered(&mut self, said: &str, sampler: &mut Sampler) -> Result<()> {
        let chats = self.speaker.base.template.is_some() && !self.say.raw;
        let base = self.speaker.base;
        let ids = match chats {
            true => {
                self.messages.push(user(said.trim()));
                Prompt::of_messages(&self.messages, base, said)?.ids(base)?
            }
            // A text goes on by its tokens: as text, they may lose the space between two words.
            false => [&self.ids[..], &base.tokens.encode(said, self.ids.is_empty())?].concat(),
        };
        let (by, report) = (self.by.as_deref(), self.report);
        let show = |piece: &str| report.piece(piece);
        let reply = self.speaker.reply(by, &ids, self.say.tokens, sampler, show)?;
        let values = json!({ "adapter": by, "text": reply.text, "tokens": reply.ids.len() });
        report.tell("", "reply", values);
        match chats {
            true => self.messages.push(json!({ "role": "assistant", "content": reply.text })),
            false => self.ids = [ids, reply.ids].concat(),
        }
        Ok(())
    }
}
